"""Validation of a graph: nodes are changed in the model, and every row is compared with what the edges predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

from pycircuit.graph import Graph
from pycircuit.graph.faithfulness import KEY, Agreement, Faithfulness, Measured
from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import checks
from pycircuit.ops.torch_settings import full_float32, without_autocast

from .graph_effects import (
    OP,
    RowReader,
    edges_of,
    layer_of,
    require_same_features,
    require_same_model,
    through_features,
)
from .group_effects import GroupEffects, NodeGroup, group_effects
from .intervention import Freeze, Frozen, Intervention
from .intervention_run import BATCH_POSITIONS, BaselineRun, InterventionRun, State, run_baseline
from .steering import Placed, Steering, changes_by_layer

NodeKind = Literal["feature", "error", "token"]
KINDS: tuple[NodeKind, ...] = get_args(NodeKind)


@overload
def validate(
    model: ReplacementModel,
    graph: Graph,
    samples: int = 32,
    seed: int = 0,
    factor: float = 0.0,
    kinds: Sequence[NodeKind] = KINDS[:1],
    *,
    groups: None = None,
) -> Faithfulness: ...
@overload
def validate(
    model: ReplacementModel,
    graph: Graph,
    *,
    groups: Sequence[NodeGroup],
    factors: Sequence[float] = (0.0, 2.0),
    freeze: Freeze = "attention",
) -> GroupEffects: ...
@without_autocast()
@full_float32()
def validate(
    model: ReplacementModel,
    graph: Graph,
    samples: int = 32,
    seed: int = 0,
    factor: float = 0.0,
    kinds: Sequence[NodeKind] = KINDS[:1],
    *,
    groups: Sequence[NodeGroup] | None = None,
    factors: Sequence[float] = (0.0, 2.0),
    freeze: Freeze = "attention",
) -> Faithfulness | GroupEffects:
    """Change sampled nodes of a graph in its model, and compare every row above them with what the graph predicts.

    Each node is multiplied by `factor` (0: ablated) on its own. With everything frozen the change of a row must be its
    edge, exactly; with MLPs running, and then in the model as it is, it should be the edge and all paths through
    features that have rows, which is where transcoders show what they miss. samples: the number of nodes, as many of
    each of `kinds` ("feature", "error", "token") as there are. The report is kept as `graph.faithfulness`, and saved.

    groups: supernodes, or lists of features. All features of a group are then multiplied together, by each of
    `factors`, under `freeze` as in `pc.intervene`, and the result is the effects on targets and on the groups'
    features: predicted by edges and all paths through other features, none of which falls below zero, and measured.
    """
    if groups is not None:
        return group_effects(model, graph, groups, factors, freeze)
    return _validate_nodes(model, graph, samples, seed, factor, kinds)


def _validate_nodes(
    model: ReplacementModel, graph: Graph, samples: int, seed: int, factor: float, kinds: Sequence[NodeKind]
) -> Faithfulness:
    """Compare the effects of sampled nodes."""
    samples = checks.whole_number(OP, "samples", samples, 1)
    seed = checks.whole_number(OP, "seed", seed, 0)
    factor = checks.number(OP, "factor", factor)
    if factor == 1 or not np.isfinite(factor):
        raise ValueError(f"{OP}: factor must be finite and change something, got {factor}")
    require_same_model(model, graph)
    nodes = _sample(graph, samples, seed, kinds)
    direct = edges_of(graph, nodes)
    total = through_features(graph, direct)
    predictions: dict[Measured, np.ndarray] = {
        "all": direct,
        "attention": total,
        "none": total,
    }
    rows = RowReader(model, graph)
    source_layer = np.array([layer_of(graph, node) for node in nodes])
    agreements = []
    with model.forward_lock:
        baseline = run_baseline(model, graph.tokens.ids.to(model.device), patterns=True)
        require_same_features(baseline, graph)
        for freeze, predicted in predictions.items():
            measured = _measure(baseline, graph, nodes, factor, freeze, rows)
            agreements += _compare(freeze, measured, (factor - 1) * predicted, rows, source_layer)
    names = [graph.describe(node)["kind"] for node in nodes]
    counts = {kind: names.count(kind) for kind in get_args(NodeKind)}
    report = Faithfulness(nodes, counts, factor, seed, agreements)
    object.__setattr__(graph, "provenance", {**graph.provenance, KEY: report.as_dict()})
    return report


def _sample(graph: Graph, samples: int, seed: int, kinds: Sequence[NodeKind]) -> list[int]:
    """Nodes that have edges into a row, in turn one of each kind while there are any."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if isinstance(kinds, str) or unknown or not kinds:
        raise ValueError(f"{OP}: kinds must be a list of {', '.join(KINDS)}, got {kinds!r}")
    bounds: dict[str, tuple[int, int]] = {
        "feature": (0, graph.first_error),
        "error": (graph.first_error, graph.first_token),
        "token": (graph.first_token, graph.first_target),
    }
    sources = np.unique(graph.rows.column.numpy()[graph.rows.weight.numpy() != 0])
    generator = np.random.default_rng(seed)
    shuffled = []
    for kind in dict.fromkeys(kinds):
        low, high = bounds[kind]
        shuffled.append(generator.permutation(sources[(sources >= low) & (sources < high)]).tolist())
    chosen: list[int] = []
    while len(chosen) < samples and any(shuffled):
        chosen += [nodes.pop() for nodes in shuffled if nodes]
    if not chosen:
        raise ValueError(f"{OP}: kinds must name nodes that have edges, got {', '.join(kinds)}, which have none")
    return sorted(chosen[:samples])


def _measure(
    baseline: BaselineRun, graph: Graph, nodes: list[int], factor: float, freeze: Freeze, rows: RowReader
) -> np.ndarray:
    """Changes of every row when each node alone is multiplied by the factor: [rows, nodes]."""
    model, state = baseline.model, baseline.state
    errors = baseline.written.clone()
    model.transcoders.add_to(errors, state.features, state.transcoder_inputs, model.ignore_positions, sign=-1.0)
    order = sorted(range(len(nodes)), key=lambda i: layer_of(graph, nodes[i]))
    step = max(1, BATCH_POSITIONS // baseline.positions)
    out = np.zeros((graph.rows.count, len(nodes)))
    frozen = Frozen.checked(OP, freeze, None, model.depth)
    for begin in range(0, len(order), step):
        batch = order[begin : begin + step]
        descriptions = [graph.describe(nodes[i]) for i in batch]
        for i, after in zip(batch, _run_batch(baseline, descriptions, factor, frozen, errors), strict=True):
            out[:, i] = rows.changes(after, state).numpy()
    return out


def _run_batch(
    baseline: BaselineRun, nodes: list[dict[str, Any]], factor: float, frozen: Frozen, errors: Tensor
) -> list[State]:
    """Run the described nodes, each multiplied by the factor alone, and return one state each."""
    model = baseline.model
    placed: list[Placed] = [
        (row, node["position"], Intervention(node["layer"], node["position"], node["feature"], factor=factor))
        for row, node in enumerate(nodes)
        if node["kind"] == "feature"
    ]
    changes = changes_by_layer(placed, errors)
    steering = Steering(model.transcoders, changes, baseline.original, frozen.layers, frozen.written)
    for row, node in enumerate(nodes):
        if node["kind"] != "feature":
            layer, position = node.get("layer", -1), node["position"]
            vector = baseline.frozen.embeddings[position] if layer < 0 else errors[layer, position]
            rows, positions = torch.tensor([[row], [position]], device=errors.device)
            steering.add(layer, rows, positions, (factor - 1) * vector[None])
    first = max(0, min(node.get("layer", -1) for node in nodes))
    return InterventionRun(baseline, steering, frozen, len(nodes), first).run()


def _compare(
    freeze: Measured, measured: np.ndarray, predicted: np.ndarray, rows: RowReader, source_layer: np.ndarray
) -> list[Agreement]:
    """Agreements by the number of layers from source to row, then of all together."""
    distance = rows.layer.numpy()[:, None] - source_layer
    counted = (distance > 0) & rows.readable.numpy()[:, None]
    masks = {int(d): counted & (distance == d) for d in np.unique(distance[counted])} | {None: counted}
    return [_agreement(freeze, d, measured[mask], predicted[mask]) for d, mask in masks.items() if mask.any()]


def _agreement(freeze: Measured, distance: int | None, measured: np.ndarray, predicted: np.ndarray) -> Agreement:
    finite = np.isfinite(measured)
    lost = len(measured) - int(finite.sum())
    measured, predicted = measured[finite], predicted[finite]
    size = float(np.abs(measured).sum())
    if not size:
        return Agreement(freeze, distance, len(measured), lost, None, None, None)
    error, scale = measured - predicted, np.abs(measured).max()  # squares of large changes would not be finite
    a, b = ((x - x.mean()) / scale for x in (measured, predicted))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return Agreement(
        freeze,
        distance,
        len(measured),
        lost,
        float(a @ b) / norms if norms > 0 else None,
        float(np.abs(error).sum()) / size,
        1 - float(((error / scale) ** 2).sum() / ((measured / scale) ** 2).sum()),
    )
