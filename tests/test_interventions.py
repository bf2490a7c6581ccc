"""The third witness: doubling a source in the real model moves every target by its edge.

The real model is transformers' own forward with patterns and denominators held (tests/frozen_hf.py).
"""

from __future__ import annotations

from typing import Any

import builders
import pytest
import torch
from builders import KINDS, replacement
from frozen_hf import HeldModel
from torch import Tensor

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")


def doubled(graph: pc.Graph, model: pc.ReplacementModel, held: HeldModel, nodes: list[int]) -> tuple[Tensor, Tensor]:
    """One run for each of the nodes (features, errors, tokens): what to add to MLP outputs, and to tokens."""
    missed, added = held.written.clone(), held.written.new_zeros(len(nodes), *held.written.shape)
    for node in range(len(graph.features)):
        layers, position, written = _written(graph, model.transcoders, node)
        missed[layers, position] -= written
    for layer in range(graph.layers):
        if (bias := model.transcoders.bias(layer)) is not None:
            missed[layer, model.ignore_positions :] -= bias
        if (skip := model.transcoders.w_skip[layer]) is not None:
            missed[layer] -= held.read[layer] @ skip
    tokens = added.new_zeros(len(nodes), graph.positions)
    for run, node in enumerate(nodes):
        about = graph.describe(node)
        if about["kind"] == "feature":
            layers, position, written = _written(graph, model.transcoders, node)
            added[run, layers, position] = written
        elif about["kind"] == "error":
            added[run, about["layer"], about["position"]] = missed[about["layer"], about["position"]]
        else:
            tokens[run, about["position"]] = 1
    return added, tokens


def _written(graph: pc.Graph, transcoders: Any, node: int) -> tuple[slice, int, Tensor]:
    """What a feature writes, at which layers and position: [layers, width]."""
    layer, position, feature = graph.features[node].tolist()
    decoder = transcoders.w_dec[layer][feature]  # [width], or [layers from here on, width]
    layers = slice(layer, graph.layers if decoder.ndim == 2 else layer + 1)
    return layers, position, graph.values[node] * decoder


def preactivations(graph: pc.Graph, model: pc.ReplacementModel, read: Tensor, logits: Tensor) -> Tensor:
    """[runs, rows]: every row's target, read off the real model."""
    centred = logits - logits.mean(-1, keepdim=True)
    found = []
    for node in graph.row_node.tolist():
        about = graph.describe(node)
        if about["kind"] == "target":
            found.append(centred[:, about["position"], about["token"]])
        else:
            row = model.transcoders.w_enc[about["layer"]][about["feature"]]
            found.append(read[about["layer"]][:, about["position"]] @ row)
    return torch.stack(found, 1)


def worst_deviation(graph: pc.Graph, model: pc.ReplacementModel, nodes: list[int]) -> tuple[float, float]:
    """Doubling every node in turn: (pre-activations off by, movements off from the edges by, of a row's norm).

    The norm is that of the whole row, all sources together; pre-activations are measured in the largest of them.
    """
    transcoders, ids = model.transcoders, graph.tokens.ids
    held = HeldModel(model.hf_model, ids, transcoders.reads, transcoders.writes, transcoders.w_skip)
    added, tokens = doubled(graph, model, held, nodes)
    before = preactivations(graph, model, *held.run(torch.zeros_like(added[:1]), torch.zeros_like(tokens[:1])))
    moved = (preactivations(graph, model, *held.run(added, tokens)) - before).T
    expected = graph.preactivation.to(before)
    off = (before[0] - expected).abs().max() / expected.abs().max()
    norms = graph.rows.sums(graph.rows.weight.double().numpy() ** 2) ** 0.5
    rows = [dense_row(graph, row)[nodes] for row in range(graph.rows.count)]
    apart = (moved - torch.stack(rows)).norm(dim=1).double() / torch.from_numpy(norms)
    return float(off), float(apart.max())


def dense_row(graph: pc.Graph, row: int) -> Tensor:
    """One row's edges over all nodes: [nodes]."""
    begin, end = graph.rows.row_ptr[row : row + 2].tolist()
    out = graph.rows.weight.new_zeros(graph.nodes)
    out[graph.rows.column[begin:end].long()] = graph.rows.weight[begin:end]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", builders.CONFIGS)
def test_doubling_a_source_moves_every_target_by_its_edge(family: str, kind: str) -> None:
    """Every feature, error and token against every feature and output, in float64, to 1e-10 of a row's norm."""
    model = replacement(family, kind, torch.float64)
    graph = pc.attribute(model, builders.prompt(9), position=[-1, 4], max_targets=3)
    assert graph.rows.count == len(graph.features) + len(graph.targets) > 20
    off, apart = worst_deviation(graph, model, list(range(graph.first_target)))
    assert off < 1e-10 and apart < 1e-10
