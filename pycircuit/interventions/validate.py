"""Does the model do what its graph says? Nodes are changed, and every row is compared with what the edges foretell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycircuit.graph import Graph
from pycircuit.graph.csr import STEP
from pycircuit.graph.faithfulness import KEY, Agreement, Faithfulness
from pycircuit.graph.influence import layer_groups
from pycircuit.model.capture import relative
from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops import checks
from pycircuit.ops.torch_settings import full_float32, without_autocast

from .intervention import Hold, Intervention
from .intervention_run import BATCH_POSITIONS, Changed, Plain, State, plain
from .steering import Place, Steering, activations_at, entries_of

OP = "validate"
KINDS = ("feature", "error", "token")
_CLOSE, _CLOSE_HALF = 1e-3, 0.25  # values of features against the graph's, of the largest


@without_autocast()
@full_float32()
def validate(
    model: ReplacementModel,
    graph: Graph,
    samples: int = 32,
    seed: int = 0,
    factor: float = 0.0,
    kinds: Sequence[str] = KINDS[:1],
) -> Faithfulness:
    """Change sampled nodes of a graph in the model it is of, and compare every row above them with what it foretells.

    Each node is multiplied by `factor` (0: ablated) on its own. With everything held the change of a row must be its
    edge, exactly; with MLPs running, and then in the model as it is, it should be the edge and all paths through
    features that have rows, which is where transcoders show what they miss. samples: how many nodes, as many of each
    of `kinds` ("feature", "error", "token") as there are. The report is kept as `graph.faithfulness`, and saved.
    """
    samples, seed = checks.whole(OP, "samples", samples, 1), checks.whole(OP, "seed", seed, 0)
    factor = checks.number(OP, "factor", factor)
    if factor == 1 or not np.isfinite(factor):
        raise ValueError(f"{OP}: factor must be finite and change something, got {factor}")
    _belongs(model, graph)
    nodes = _sample(graph, samples, seed, kinds)
    direct = _edges(graph, nodes)
    whole = _through_features(graph, direct)
    foretold = {"all": direct, "attention": whole, "none": whole}
    rows = _Rows(model, graph)
    source = np.array([_layer(graph, node) for node in nodes])
    agreements = []
    with model.running:
        start = plain(model, graph.tokens.ids.to(model.device), patterns=True)
        _same_features(start, graph)
        for freeze, expected in foretold.items():
            measured = _measure(start, graph, nodes, factor, freeze, rows)
            agreements += _compare(freeze, measured, (factor - 1) * expected, rows, source)
    names = [graph.describe(node)["kind"] for node in nodes]
    counts = {kind: names.count(kind) for kind in KINDS}
    report = Faithfulness(nodes, counts, factor, seed, agreements)
    object.__setattr__(graph, "provenance", {**graph.provenance, KEY: report.as_dict()})
    return report


def _belongs(model: ReplacementModel, graph: Graph) -> None:
    check_model(OP, model)
    if not isinstance(graph, Graph):
        raise TypeError(f"{OP}: graph must be a pc.Graph, got {type(graph).__name__}")
    if graph.layers != model.depth:
        raise ValueError(f"{OP}: graph must have the model's {model.depth} layers, got {graph.layers}")
    if not graph.rows.entries:
        raise ValueError(f"{OP}: graph must have edges, got none")
    model.tokens(graph.tokens.ids)


def _same_features(start: Plain, graph: Graph) -> None:
    """The graph's activations are the model's own."""
    transcoders, found = start.model.transcoders, start.state.features
    half = start.model.weights.stored != start.model.dtype
    values = torch.zeros_like(graph.values)
    for layer in range(graph.layers):
        at = graph.features[:, 0] == layer
        if not at.any():
            continue
        position, index = graph.features[at, 1:].to(start.model.device).unbind(1)
        if int(index.max()) >= transcoders.size(layer):
            raise ValueError(f"{OP}: graph must be of this model and its transcoders, got feature {int(index.max())}")
        values[at] = activations_at(found[layer], position, index, transcoders.size(layer)).to(values)
    off = relative(values, graph.values) if len(values) else 0.0
    if off > (_CLOSE_HALF if half else _CLOSE):
        raise ValueError(
            f"{OP}: graph must be of this model and its transcoders, got activations that are {off:.2g} of the "
            "largest apart"
        )


def _sample(graph: Graph, samples: int, seed: int, kinds: Sequence[str]) -> list[int]:
    """Nodes that feed a row, in turn one of each kind while there are any."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if isinstance(kinds, str) or unknown or not kinds:
        raise ValueError(f"{OP}: kinds must be a list of {', '.join(KINDS)}, got {kinds!r}")
    bounds = {
        "feature": (0, graph.first_error),
        "error": (graph.first_error, graph.first_token),
        "token": (graph.first_token, graph.first_target),
    }
    feeding = np.unique(graph.rows.column.numpy()[graph.rows.weight.numpy() != 0])
    generator, piles = np.random.default_rng(seed), []
    for kind in dict.fromkeys(kinds):
        low, high = bounds[kind]
        piles.append(generator.permutation(feeding[(feeding >= low) & (feeding < high)]).tolist())
    chosen: list[int] = []
    while len(chosen) < samples and any(piles):
        chosen += [pile.pop() for pile in piles if pile]
    if not chosen:
        raise ValueError(f"{OP}: kinds must name nodes that have edges, got {', '.join(kinds)}, which have none")
    return sorted(chosen[:samples])


def _layer(graph: Graph, node: int) -> int:
    return int(graph.describe(node).get("layer", -1))


def _edges(graph: Graph, nodes: list[int]) -> np.ndarray:
    """Of each node to each row: [rows, nodes] float64."""
    place = np.full(graph.nodes, -1)
    place[nodes] = np.arange(len(nodes))
    column = place[graph.rows.column.numpy()]
    at = np.flatnonzero(column >= 0)
    row = np.searchsorted(graph.rows.row_ptr.numpy(), at, side="right") - 1
    out = np.zeros((graph.rows.count, len(nodes)))
    out[row, column[at]] = graph.rows.weight.numpy()[at]
    return out


def _through_features(graph: Graph, direct: np.ndarray) -> np.ndarray:
    """The same with all that runs through features that have a row: [rows, nodes].

    A feature's activation moves by what reaches its row, and hands on its edges in that proportion. From the lowest
    layer up, so that everything below a row is known.
    """
    total, column, weight = direct.copy(), graph.rows.column.numpy(), graph.rows.weight.numpy()
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
    """What every row that can be read off the model reads, layer by layer; the depth stands for the logits."""

    def __init__(self, model: ReplacementModel, graph: Graph) -> None:
        self.model, node = model, graph.row_node
        inner = node < graph.first_error
        self.layer = torch.full_like(node, graph.layers)
        self.position, self.index = torch.zeros_like(node), torch.full_like(node, -1)
        features = graph.features[node[inner]]
        self.layer[inner], self.position[inner], self.index[inner] = features.unbind(1)
        target = node[~inner] - graph.first_target
        self.position[~inner], self.index[~inner] = graph.targets.positions[target], graph.targets.ids[target]
        self.known = self.index >= 0  # a target that is no token is read by a vector that the graph does not hold

    def moved(self, after: State, before: State) -> Tensor:
        """[rows], how far each row's pre-activation moved; zero where it cannot be told."""
        out = torch.zeros(len(self.layer), dtype=torch.float64, device="cpu")
        for layer in range(after.first, self.model.depth + 1):
            at = ((self.layer == layer) & self.known).nonzero()[:, 0]
            position, index = self.position[at].to(after.final.device), self.index[at].to(after.final.device)
            if layer == self.model.depth:
                change = after.final - before.final
                vectors = self.model.weights.unembedding[index].to(change.dtype) - self.model.weights.unembedding_mean
            elif len(at):
                change = after.reads(layer) - before.reads(layer)
                vectors = self.model.transcoders.w_enc[layer][index].to(change.dtype)
            else:
                continue
            out[at] = (change[position] * vectors).sum(1).double().cpu()
        return out


def _measure(start: Plain, graph: Graph, nodes: list[int], factor: float, freeze: str, rows: _Rows) -> np.ndarray:
    """How far every row moves when each node alone is multiplied: [rows, nodes]."""
    model, state = start.model, start.state
    errors = start.written.clone()
    model.transcoders.add_to(errors, state.features, state.read, model.ignore_positions, sign=-1.0)
    order = sorted(range(len(nodes)), key=lambda i: _layer(graph, nodes[i]))
    step, out = max(1, BATCH_POSITIONS // start.positions), np.zeros((graph.rows.count, len(nodes)))
    hold = Hold.of(OP, freeze, None, model.depth)
    for begin in range(0, len(order), step):
        batch = order[begin : begin + step]
        about = [graph.describe(nodes[i]) for i in batch]
        for at, after in zip(batch, _batch(start, about, factor, hold, errors), strict=True):
            out[:, at] = rows.moved(after, state).numpy()
    return out


def _batch(start: Plain, about: list[dict[str, Any]], factor: float, hold: Hold, errors: Tensor) -> list[State]:
    """One state for each node described, multiplied by the factor."""
    model = start.model
    places: list[Place] = [
        (row, node["position"], Intervention(node["layer"], node["position"], node["feature"], factor=factor))
        for row, node in enumerate(about)
        if node["kind"] == "feature"
    ]
    steering = Steering(model.transcoders, entries_of(places, errors), start.original, hold.layers, hold.written)
    for row, node in enumerate(about):
        if node["kind"] != "feature":
            layer, position = node.get("layer", -1), node["position"]
            whole = start.frozen.embeddings[position] if layer < 0 else errors[layer, position]
            at = torch.tensor([[row], [position]], device=errors.device)
            steering.add(layer, at[0], at[1], (factor - 1) * whole[None])
    first = max(0, min(node.get("layer", -1) for node in about))
    return Changed(start, steering, hold, len(about), first).run()


def _compare(
    freeze: str, measured: np.ndarray, foretold: np.ndarray, rows: _Rows, source: np.ndarray
) -> list[Agreement]:
    """By how many layers a row reads above the source, then all together."""
    distance = rows.layer.numpy()[:, None] - source
    counted = (distance > 0) & rows.known.numpy()[:, None]
    masks = {int(d): counted & (distance == d) for d in np.unique(distance[counted])} | {None: counted}
    return [_agreement(freeze, d, measured[at], foretold[at]) for d, at in masks.items() if at.any()]


def _agreement(freeze: str, distance: int | None, measured: np.ndarray, foretold: np.ndarray) -> Agreement:
    finite = np.isfinite(measured)
    lost = len(measured) - int(finite.sum())
    measured, foretold = measured[finite], foretold[finite]
    size = float(np.abs(measured).sum())
    if not size:
        return Agreement(freeze, distance, len(measured), lost, None, None, None)
    off, scale = measured - foretold, np.abs(measured).max()  # squares of large changes would not be finite
    a, b = ((x - x.mean()) / scale for x in (measured, foretold))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return Agreement(
        freeze,
        distance,
        len(measured),
        lost,
        float(a @ b) / norms if norms > 0 else None,
        float(np.abs(off).sum()) / size,
        1 - float(((off / scale) ** 2).sum() / ((measured / scale) ** 2).sum()),
    )
