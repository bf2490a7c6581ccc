"""Effects that a graph predicts, and the rows of a model that they are compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pycircuit.graph import Graph
from pycircuit.graph.csr import STEP
from pycircuit.graph.influence import layer_groups
from pycircuit.model.agreement import relative_error
from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.trace.contrast import contrasts_of, direction

from .intervention_run import BaselineRun, State
from .steering import activations_at

OP = "validate"
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.25  # of the model's activations against the graph's, relative to the largest


def require_same_model(model: ReplacementModel, graph: Graph) -> None:
    """Raise unless the graph can be of this model."""
    check_model(OP, model)
    if not isinstance(graph, Graph):
        raise TypeError(f"{OP}: graph must be a pc.Graph, got {type(graph).__name__}")
    if graph.layers != model.depth:
        raise ValueError(f"{OP}: graph must have the model's {model.depth} layers, got {graph.layers}")
    if not graph.rows.entries:
        raise ValueError(f"{OP}: graph must have edges, got none")
    model.tokens(graph.tokens.ids)


def require_same_features(baseline: BaselineRun, graph: Graph) -> None:
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


def layer_of(graph: Graph, node: int) -> int:
    return int(graph.describe(node).get("layer", -1))


def edges_of(graph: Graph, nodes: list[int]) -> np.ndarray:
    """Edges of each node into each row: [rows, nodes] float64."""
    column_of = np.full(graph.nodes, -1)
    column_of[nodes] = np.arange(len(nodes))
    column = column_of[graph.rows.column.numpy()]
    entries = np.flatnonzero(column >= 0)
    row = np.searchsorted(graph.rows.row_ptr.numpy(), entries, side="right") - 1
    out = np.zeros((graph.rows.count, len(nodes)))
    out[row, column[entries]] = graph.rows.weight.numpy()[entries]
    return out


def through_features(
    graph: Graph, direct: np.ndarray, changed: np.ndarray | None = None, floor: bool = False
) -> np.ndarray:
    """Edges and all paths through features that have a row: [rows, sources].

    A feature's activation moves by the change of its row, and hands on its edges in that proportion. From the lowest
    layer up, so that everything below a row is known. direct: [rows, sources], edges or changes. changed: [rows,
    sources], True for the rows of a source's own features, which hand on nothing more. floor: no activation falls
    below zero; `direct` must then be changes.
    """
    total = direct.copy()
    column, weight = graph.rows.column.numpy(), graph.rows.weight.numpy()
    row_of = np.full(graph.nodes, -1)
    row_of[graph.row_node.numpy()] = np.arange(graph.rows.count)
    values = np.zeros(graph.nodes)
    values[: graph.first_error] = graph.values.numpy()
    per_unit = np.divide(1.0, values, out=np.zeros(graph.nodes), where=values != 0)
    for group in reversed(layer_groups(graph)):
        for block in graph.rows.blocks(group, max(1, (STEP << 4) // direct.shape[1])):
            source = block.gather(column)
            through = row_of[source]
            share = np.where(through >= 0, block.gather(weight) * per_unit[source], 0.0)
            moved = total[through]
            if floor:
                np.maximum(moved, -np.abs(values[source])[:, None], out=moved)
            total[block.rows] += block.reduce(np.add, share[:, None] * moved)
        if changed is not None:
            total[group] = np.where(changed[group], 0.0, total[group])
    return total


class RowReader:
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
