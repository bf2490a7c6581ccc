"""Deviation of a graph's edges from the frozen transformers model, when its nodes are doubled one by one."""

from __future__ import annotations

from typing import Any

import torch
from frozen_hf import FrozenHFModel
from torch import Tensor

import pycircuit as pc


def doubled_nodes(
    graph: pc.Graph, model: pc.ReplacementModel, frozen: FrozenHFModel, nodes: list[int]
) -> tuple[Tensor, Tensor]:
    """Additions to MLP outputs and to token embeddings, one run for each of the nodes (features, errors, tokens)."""
    errors = frozen.written.clone()
    added = frozen.written.new_zeros(len(nodes), *frozen.written.shape)
    for node in range(len(graph.features)):
        layers, position, written = _written(graph, model.transcoders, node)
        errors[layers, position] -= written
    for layer in range(graph.layers):
        if (bias := model.transcoders.bias(layer)) is not None:
            errors[layer, model.ignore_positions :] -= bias
        if (skip := model.transcoders.w_skip[layer]) is not None:
            errors[layer] -= frozen.read[layer] @ skip
    tokens = added.new_zeros(len(nodes), graph.positions)
    for run, node in enumerate(nodes):
        description = graph.describe(node)
        position = description["position"]
        if description["kind"] == "feature":
            layers, position, written = _written(graph, model.transcoders, node)
            added[run, layers, position] = written
        elif description["kind"] == "error":
            added[run, description["layer"], position] = errors[description["layer"], position]
        else:
            tokens[run, position] = 1
    return added, tokens


def _written(graph: pc.Graph, transcoders: Any, node: int) -> tuple[slice, int, Tensor]:
    """The layers and the position that a feature writes to, and its writes there: [layers, width]."""
    layer, position, feature = graph.features[node].tolist()
    decoder = transcoders.w_dec[layer][feature]  # [width], or [layers from `layer` on, width]
    layers = slice(layer, graph.layers if decoder.ndim == 2 else layer + 1)
    return layers, position, graph.values[node] * decoder


def preactivations(graph: pc.Graph, model: pc.ReplacementModel, read: Tensor, logits: Tensor) -> Tensor:
    """Pre-activations of every row's target, read off the transformers model: [runs, rows]."""
    centred = logits - logits.mean(-1, keepdim=True)
    columns = []
    for node in graph.row_node.tolist():
        description = graph.describe(node)
        layer, position = description.get("layer"), description["position"]
        if description["kind"] == "target":
            columns.append(centred[:, position, description["token"]])
        else:
            row = model.transcoders.w_enc[layer][description["feature"]]
            columns.append(read[layer][:, position] @ row)
    return torch.stack(columns, 1)


def worst_deviation(graph: pc.Graph, model: pc.ReplacementModel, nodes: list[int]) -> tuple[float, float]:
    """The errors of pre-activations, and of edges as changes when every node is doubled in turn.

    Edges are measured in the norm of their row, all sources together; pre-activations in the largest of them.
    """
    transcoders, ids = model.transcoders, graph.tokens.ids
    frozen = FrozenHFModel(model.hf_model, ids, transcoders.reads, transcoders.writes, transcoders.w_skip)
    added, tokens = doubled_nodes(graph, model, frozen, nodes)
    before = preactivations(graph, model, *frozen.run(torch.zeros_like(added[:1]), torch.zeros_like(tokens[:1])))
    changes = (preactivations(graph, model, *frozen.run(added, tokens)) - before).T
    expected = graph.preactivation.to(before)
    preactivation_error = (before[0] - expected).abs().max() / expected.abs().max()
    norms = graph.rows.sums(graph.rows.weight.double().numpy() ** 2) ** 0.5
    rows = [dense_row(graph, row)[nodes] for row in range(graph.rows.count)]
    edge_error = (changes - torch.stack(rows)).norm(dim=1).double() / torch.from_numpy(norms)
    return float(preactivation_error), float(edge_error.max())


def dense_row(graph: pc.Graph, row: int) -> Tensor:
    """Edges of one row over all nodes: [nodes]."""
    begin, end = graph.rows.row_ptr[row : row + 2].tolist()
    out = graph.rows.weight.new_zeros(graph.nodes)
    out[graph.rows.column[begin:end].long()] = graph.rows.weight[begin:end]
    return out
