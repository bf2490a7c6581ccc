"""Validation of a graph: nodes are changed in the model, and every row is compared with what the edges predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pycircuit.graph import Graph
from pycircuit.graph.csr import STEP
from pycircuit.graph.faithfulness import KEY, Agreement, Faithfulness, Measured
from pycircuit.graph.influence import layer_groups
from pycircuit.model.agreement import relative_error
from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops import checks
from pycircuit.ops.torch_settings import full_float32, without_autocast
from pycircuit.trace.contrast import contrasts_of, direction

from .intervention import Freeze, Frozen, Intervention
from .intervention_run import BATCH_POSITIONS, BaselineRun, InterventionRun, State, run_baseline
from .steering import Placed, Steering, activations_at, changes_by_layer

OP = "validate"
NodeKind = Literal["feature", "error", "token"]
KINDS: tuple[NodeKind, ...] = get_args(NodeKind)
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.25  # of the model's activations against the graph's, relative to the largest


@without_autocast()
@full_float32()
def validate(
    model: ReplacementModel,
    graph: Graph,
    samples: int = 32,
    seed: int = 0,
    factor: float = 0.0,
    kinds: Sequence[NodeKind] = KINDS[:1],
) -> Faithfulness:
    """Change sampled nodes of a graph in its model, and compare every row above them with what the graph predicts.

    Each node is multiplied by `factor` (0: ablated) on its own. With everything frozen the change of a row must be its
    edge, exactly; with MLPs running, and then in the model as it is, it should be the edge and all paths through
    features that have rows, which is where transcoders show what they miss. samples: the number of nodes, as many of
    each of `kinds` ("feature", "error", "token") as there are. The report is kept as `graph.faithfulness`, and saved.
    """
    samples = checks.whole_number(OP, "samples", samples, 1)
    seed = checks.whole_number(OP, "seed", seed, 0)
    factor = checks.number(OP, "factor", factor)
    if factor == 1 or not np.isfinite(factor):
        raise ValueError(f"{OP}: factor must be finite and change something, got {factor}")
    _require_same_model(model, graph)
    nodes = _sample(graph, samples, seed, kinds)
    direct = _edges(graph, nodes)
    through_features = _through_features(graph, direct)
    predictions: dict[Measured, np.ndarray] = {
        "all": direct,
        "attention": through_features,
        "none": through_features,
    }
    rows = _Rows(model, graph)
    source_layer = np.array([_layer(graph, node) for node in nodes])
    agreements = []
    with model.forward_lock:
        baseline = run_baseline(model, graph.tokens.ids.to(model.device), patterns=True)
        _require_same_features(baseline, graph)
        for freeze, predicted in predictions.items():
            measured = _measure(baseline, graph, nodes, factor, freeze, rows)
            agreements += _compare(freeze, measured, (factor - 1) * predicted, rows, source_layer)
    names = [graph.describe(node)["kind"] for node in nodes]
    counts = {kind: names.count(kind) for kind in get_args(NodeKind)}
    report = Faithfulness(nodes, counts, factor, seed, agreements)
    object.__setattr__(graph, "provenance", {**graph.provenance, KEY: report.as_dict()})
    return report


def _require_same_model(model: ReplacementModel, graph: Graph) -> None:
    """Raise unless the graph can be of this model."""
    check_model(OP, model)
    if not isinstance(graph, Graph):
        raise TypeError(f"{OP}: graph must be a pc.Graph, got {type(graph).__name__}")
    if graph.layers != model.depth:
        raise ValueError(f"{OP}: graph must have the model's {model.depth} layers, got {graph.layers}")
    if not graph.rows.entries:
        raise ValueError(f"{OP}: graph must have edges, got none")
    model.tokens(graph.tokens.ids)


def _require_same_features(baseline: BaselineRun, graph: Graph) -> None:
    """Raise unless the graph's activations are the model's own."""
    model, features = baseline.model, baseline.state.features
    half = model.weights.stored != model.dtype
    values = torch.zeros_like(graph.values)
    for layer in range(graph.layers):
        in_layer = graph.features[:, 0] == layer
        if not in_layer.any():
            continue
        position, index = graph.features[in_layer, 1:].to(model.device).unbind(1)
        size = model.transcoders.size(layer)
        if int(index.max()) >= size:
            raise ValueError(f"{OP}: graph must be of this model and its transcoders, got feature {int(index.max())}")
        values[in_layer] = activations_at(features[layer], position, index, size).to(values)
    error = relative_error(values, graph.values) if len(values) else 0.0
    if error > (_TOLERANCE_HALF if half else _TOLERANCE):
        raise ValueError(
            f"{OP}: graph must be of this model and its transcoders, got activations that are {error:.2g} of the "
            "largest apart"
        )


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


def _layer(graph: Graph, node: int) -> int:
    return int(graph.describe(node).get("layer", -1))


def _edges(graph: Graph, nodes: list[int]) -> np.ndarray:
    """Edges of each node into each row: [rows, nodes] float64."""
    column_of = np.full(graph.nodes, -1)
    column_of[nodes] = np.arange(len(nodes))
    column = column_of[graph.rows.column.numpy()]
    entries = np.flatnonzero(column >= 0)
    row = np.searchsorted(graph.rows.row_ptr.numpy(), entries, side="right") - 1
    out = np.zeros((graph.rows.count, len(nodes)))
    out[row, column[entries]] = graph.rows.weight.numpy()[entries]
    return out


def _through_features(graph: Graph, direct: np.ndarray) -> np.ndarray:
    """Edges and all paths through features that have a row: [rows, nodes].

    A feature's activation moves by the change of its row, and hands on its edges in that proportion. From the lowest
    layer up, so that everything below a row is known.
    """
    total = direct.copy()
    column, weight = graph.rows.column.numpy(), graph.rows.weight.numpy()
    row_of = np.full(graph.nodes, -1)
    row_of[graph.row_node.numpy()] = np.arange(graph.rows.count)
    per_unit = np.zeros(graph.nodes)
    values = graph.values.numpy().astype(np.float64)
    np.divide(1.0, values, out=per_unit[: len(values)], where=values != 0)
    for group in reversed(layer_groups(graph)):
        for block in graph.rows.blocks(group, max(1, (STEP << 4) // direct.shape[1])):
            source = block.gather(column)
            through = row_of[source]
            share = np.where(through >= 0, block.gather(weight) * per_unit[source], 0.0)
            total[block.rows] += block.reduce(np.add, share[:, None] * total[through])
    return total


class _Rows:
    """The layer, position and index at which each row of a graph is read; the depth stands for the logits."""

    def __init__(self, model: ReplacementModel, graph: Graph) -> None:
        self.model, node = model, graph.row_node
        inner = node < graph.first_error
        self.layer = torch.full_like(node, graph.layers)
        self.position, self.index = torch.zeros_like(node), torch.full_like(node, -1)
        features = graph.features[node[inner]]
        self.layer[inner], self.position[inner], self.index[inner] = features.unbind(1)
        target = node[~inner] - graph.first_target
        self.position[~inner], self.index[~inner] = graph.targets.positions[target], graph.targets.ids[target]
        # The graph does not hold the vector of a direction; that of a contrast comes from its tokens.
        contrasts = contrasts_of(OP, graph, len(model.weights.unembedding))
        target_of_row = dict(zip((~inner).nonzero()[:, 0].tolist(), target.tolist(), strict=True))
        self.contrasts = {row: contrasts[t] for row, t in target_of_row.items() if t in contrasts}
        self.readable = self.index >= 0
        self.readable[list(self.contrasts)] = True

    def changes(self, after: State, before: State) -> Tensor:
        """Changes of the rows' pre-activations, zero where a row is not readable: [rows]."""
        out = torch.zeros(len(self.layer), dtype=torch.float64, device="cpu")
        for layer in range(after.first, self.model.depth + 1):
            rows = ((self.layer == layer) & self.readable).nonzero()[:, 0]
            position, index = self.position[rows].to(after.final.device), self.index[rows].to(after.final.device)
            if layer == self.model.depth:
                change = after.final - before.final
                vectors = self._output_vectors(rows.tolist(), index).to(change.dtype)
            elif len(rows):
                change = after.reads(layer) - before.reads(layer)
                vectors = self.model.transcoders.w_enc[layer][index].to(change.dtype)
            else:
                continue
            out[rows] = (change[position] * vectors).sum(1).double().cpu()
        return out

    def _output_vectors(self, rows: list[int], index: Tensor) -> Tensor:
        """Vectors of targets at the end of the stream: [rows, width]. index: their tokens, -1 of a contrast."""
        weights = self.model.weights
        vectors = weights.unembedding[index.clamp(min=0)].to(weights.unembedding_mean.dtype) - weights.unembedding_mean
        for i, row in enumerate(rows):
            if row in self.contrasts:
                vectors[i] = direction(weights.unembedding, self.contrasts[row])
        return vectors


def _measure(
    baseline: BaselineRun, graph: Graph, nodes: list[int], factor: float, freeze: Freeze, rows: _Rows
) -> np.ndarray:
    """Changes of every row when each node alone is multiplied by the factor: [rows, nodes]."""
    model, state = baseline.model, baseline.state
    errors = baseline.written.clone()
    model.transcoders.add_to(errors, state.features, state.transcoder_inputs, model.ignore_positions, sign=-1.0)
    order = sorted(range(len(nodes)), key=lambda i: _layer(graph, nodes[i]))
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
    freeze: Measured, measured: np.ndarray, predicted: np.ndarray, rows: _Rows, source_layer: np.ndarray
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
