"""circuit-tracer 0.5.0 on the same weights: features, edges, which rows are chosen, what pruning keeps, scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pair
import pytest
import torch
from circuit_tracer.graph import compute_graph_scores, prune_graph
from torch import Tensor

import pycircuit as pc

SIZE = pair.Size()
SIZES = {"llama": SIZE, "gemma2": SIZE, "gpt2": replace(SIZE, kv_heads=SIZE.heads)}
KINDS = {
    "plt_jumprelu": pair.Kind(),
    "plt_topk_skip": pair.Kind(rule="topk", skip=True),
    "plt_raw": pair.Kind(reads="mlp_normed", writes="mlp_raw"),
    "clt_jumprelu": pair.Kind(cross=True, reads="resid_mid"),
    "clt_relu_skip": pair.Kind(cross=True, reads="resid_mid", rule="relu", skip=True),
}
TYPES = {"float32": torch.float32, "float64": torch.float64}
# transformers rounds a float64 Llama's norms to float32, circuit-tracer Gemma's gains: exact for GPT-2 alone.
CLOSE = {("gpt2", "float64"): 1e-10}
ROW = 1e-4
ACTIVE, POSITIONS = 6, 13


@cache
def models(family: str, kind: str, dtype: str) -> tuple[Any, Any]:
    arguments = (family, KINDS[kind], SIZES[family], TYPES[dtype], ACTIVE)
    return pair.our_model(*arguments), pair.circuit_tracer_model(*arguments)


def ids() -> Tensor:
    return pair.prompt(POSITIONS, SIZE.vocabulary)


@cache
def full_graphs(family: str, kind: str, dtype: str) -> tuple[pc.Graph, Any]:
    ours, theirs = models(family, kind, dtype)
    return pair.trace_ours(ours, ids()), pair.trace_circuit_tracer(theirs, ids(), batch_size=16)


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest distance of two rows over the norm of circuit-tracer's; rows without edges must be zero in both."""
    norm = theirs.norm(dim=1)
    assert not ours[norm == 0].any()
    return float(((ours - theirs).norm(dim=1)[norm > 0] / norm[norm > 0]).max())


EVERY = pytest.mark.parametrize(
    ("family", "kind", "dtype"), [(f, k, d) for f in pair.CONFIGS for k in KINDS for d in TYPES]
)
EXACT = pytest.mark.parametrize(("family", "kind"), [(f, k) for f in pair.CONFIGS for k in KINDS])


@EVERY
def test_the_same_features_and_targets(family: str, kind: str, dtype: str) -> None:
    ours, theirs = full_graphs(family, kind, dtype)
    assert len(ours.features) > 100
    assert torch.equal(ours.features, theirs.active_features)
    assert torch.allclose(ours.values, theirs.activation_values, rtol=1e-4, atol=1e-5)
    assert ours.targets.ids.tolist() == [target.vocab_idx for target in theirs.logit_targets]
    assert torch.allclose(ours.targets.weights, theirs.logit_probabilities.double(), rtol=1e-4)


@EVERY
def test_every_edge(family: str, kind: str, dtype: str) -> None:
    ours, theirs = full_graphs(family, kind, dtype)
    dense = ours.dense()
    assert dense.dtype == TYPES[dtype] == theirs.adjacency_matrix.dtype
    assert off(dense, theirs.adjacency_matrix) < CLOSE.get((family, dtype), ROW)


@EVERY
@pytest.mark.parametrize(("batch", "interval", "most"), [(4, 2, 30), (8, 1, 45), (16, 4, 50)])
def test_the_same_rows_are_chosen(family: str, kind: str, dtype: str, batch: int, interval: int, most: int) -> None:
    ours, theirs = models(family, kind, dtype)
    graph = pair.trace_ours(ours, ids(), max_features=most, round_size=batch * interval)
    settings = {"batch_size": batch, "update_interval": interval, "max_feature_nodes": most}
    their_graph = pair.trace_circuit_tracer(theirs, ids(), **settings)
    remaining = pair.selected(graph)
    assert len(remaining.features) == most < len(graph.features)
    assert torch.equal(remaining.features, their_graph.active_features[their_graph.selected_features])
    assert off(remaining.dense(), their_graph.adjacency_matrix) < CLOSE.get((family, dtype), ROW)


@contextmanager
def in_float64() -> Iterator[None]:
    """circuit-tracer's pruning makes its vectors in torch's default type."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def chosen(family: str, kind: str) -> tuple[pc.Graph, Any]:
    """A graph of 60 features. circuit-tracer prunes the very edges that we have: its own differ by rounding."""
    ours, theirs = models(family, kind, "float64")
    graph = pair.selected(pair.trace_ours(ours, ids(), max_features=60, round_size=16))
    their_graph = pair.trace_circuit_tracer(theirs, ids(), batch_size=16, update_interval=1, max_feature_nodes=60)
    assert off(graph.dense(), their_graph.adjacency_matrix) < ROW
    their_graph.adjacency_matrix, their_graph.logit_probabilities = graph.dense(), graph.targets.weights
    return graph, their_graph


def edges(graph: pc.Graph, mask: Tensor) -> Tensor:
    """A mask of entries as circuit-tracer has it: [nodes, nodes]."""
    out = torch.zeros(graph.nodes, graph.nodes, dtype=torch.bool)
    row = graph.row_node.repeat_interleave(graph.rows.row_ptr.diff().long())
    out[row[mask], graph.rows.column[mask].long()] = True
    return out


@EXACT
@pytest.mark.parametrize(
    ("node", "edge"), [(0.99, 0.98), (0.8, 0.98), (0.5, 0.9), (0.95, 0.999), (0.6, 0.8), (0.8, 0.7)]
)
def test_the_same_nodes_and_edges_are_kept(family: str, kind: str, node: float, edge: float) -> None:
    graph, their_graph = chosen(family, kind)
    ours = graph.prune(node, edge)
    with in_float64():
        theirs = prune_graph(their_graph, node, edge)
    assert torch.equal(ours.node_mask, theirs.node_mask)
    assert torch.equal(edges(graph, ours.edge_mask), theirs.edge_mask)
    assert ours.node_mask[: graph.first_token].any() and not ours.node_mask[: graph.first_token].all()
    if node == 0.99:
        assert ours.node_mask[: graph.first_error].any()
    sources = ours.node_mask[: graph.first_target].sum()
    assert torch.allclose(ours.cumulative()[:sources], theirs.cumulative_scores[ours.node_mask][:sources])


@EXACT
def test_the_same_scores(family: str, kind: str) -> None:
    graph, their_graph = chosen(family, kind)
    with in_float64():
        replacement, completeness = compute_graph_scores(their_graph)
    assert 0 < replacement < 1 and 0 < completeness < 1
    assert tuple(graph.scores()) == pytest.approx((replacement, completeness), rel=1e-9)


@EXACT
def test_the_error_they_drop_is_all_that_breaks_their_law(family: str, kind: str) -> None:
    """Their rows do not add up to the pre-activation; with the first position's errors, which we keep, they do."""
    honest = pc.attribute(models(family, kind, "float64")[0], ids())
    bare, their_graph = full_graphs(family, kind, "float64")
    first = honest.first_error + torch.arange(SIZE.layers) * POSITIONS
    dropped = honest.dense()[:, first]
    assert honest.certificate < 1e-10 < 1e-3 < bare.certificate
    rows = torch.cat([their_graph.adjacency_matrix[honest.row_node].sum(1, keepdim=True), dropped[honest.row_node]], 1)
    expected = (honest.preactivation - honest.bias).to(rows)
    scale = expected.abs() + their_graph.adjacency_matrix[honest.row_node].abs().sum(1)
    assert float(((rows.sum(1) - expected).abs() / scale).max()) < 1e-6
