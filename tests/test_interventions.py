"""The third witness: doubling a source in the real model moves every target by its edge.

The real model is transformers' own forward with patterns and denominators held (tests/frozen_hf.py).
"""

from __future__ import annotations

import pytest
import tiny_models
import torch
from frozen_hf import HeldModel
from test_trace import KINDS, replacement
from torch import Tensor

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")


def doubled(graph: pc.Graph, model: pc.ReplacementModel, held: HeldModel) -> tuple[Tensor, Tensor]:
    """One run for each column of the graph up to its tokens: what to add to MLP outputs, and to tokens."""
    transcoders, depth, positions = model.transcoders, graph.layers, graph.positions
    added = held.written.new_zeros(graph.first_target, *held.written.shape)
    for run, (layer, position, feature) in enumerate(graph.features.tolist()):
        writes = transcoders.w_dec[layer][feature]  # [width], or [layers from here on, width]
        last = depth if writes.ndim == 2 else layer + 1
        added[run, layer:last, position] = graph.values[run] * writes
    missed = held.written - added.sum(0)
    for layer in range(depth):
        if (bias := transcoders.bias(layer)) is not None:
            missed[layer, model.ignore_positions :] -= bias
        if (skip := transcoders.w_skip[layer]) is not None:
            missed[layer] -= held.read[layer] @ skip
    for layer in range(depth):
        for position in range(positions):
            added[graph.error_node(layer, position), layer, position] = missed[layer, position]
    tokens = added.new_zeros(graph.first_target, positions)
    tokens[graph.first_token :] = torch.eye(positions, dtype=added.dtype)
    return added, tokens


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny_models.CONFIGS)
def test_doubling_a_source_moves_every_target_by_its_edge(family: str, kind: str) -> None:
    """Every feature, error and token against every feature and output, in float64, to 1e-10 of a row's norm."""
    model, ids = replacement(family, kind, torch.float64), tiny_models.prompt(9)
    graph = pc.attribute(model, ids, position=[-1, 4], max_targets=3)
    held = HeldModel(model.hf_model, ids, model.transcoders.reads, model.transcoders.writes, model.transcoders.w_skip)
    added, tokens = doubled(graph, model, held)
    still = torch.zeros(1, *added.shape[1:], dtype=added.dtype), torch.zeros(1, len(ids), dtype=added.dtype)
    before = preactivations(graph, model, *held.run(*still))
    torch.testing.assert_close(before[0], graph.preactivation, rtol=1e-10, atol=1e-10)
    moved = preactivations(graph, model, *held.run(added, tokens)) - before
    edges = graph.dense()[graph.row_node, : graph.first_target]
    assert len(edges) == len(graph.features) + len(graph.targets) > 20
    assert float(((moved.T - edges).norm(dim=1) / edges.norm(dim=1)).max()) < 1e-10
