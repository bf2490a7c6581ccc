"""Tests of graphs: order of nodes, the law, views, invariants, arguments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from graph_references import shuffled, with_rows
from graphs import assemble, by_hand, random_features, random_graph, random_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

import pycircuit as pc
from pycircuit.graph import Graph, Rows, Targets

pytestmark = pytest.mark.usefixtures("one_thread")


def test_order_of_nodes() -> None:
    graph = random_graph(layers=4, positions=3)
    n = len(graph.features)
    assert (graph.first_error, graph.first_token, graph.first_target, graph.nodes) == (n, n + 12, n + 15, n + 17)
    assert graph.describe(graph.error_node(2, 1)) == {"kind": "error", "layer": 2, "position": 1}
    assert graph.error_node(2, 1) == n + 7
    assert graph.describe(graph.token_node(2)) == {"kind": "token", "position": 2, "token": 9, "label": " w2"}
    assert graph.describe(graph.target_node(1))["label"] == " t1"
    assert graph.describe(graph.feature_node(*graph.features[3].tolist()))["kind"] == "feature"
    assert graph.feature_node(*graph.features[3].tolist()) == 3
    with pytest.raises(KeyError, match="must be active"):
        graph.feature_node(0, 0, 99)


def test_exported_at_the_top() -> None:
    assert pc.Graph is Graph


def test_dense_is_the_matrix() -> None:
    features = random_features(30, 4, 3, 1)
    matrix = random_matrix(features, 4, 3, 2, 0.5, 1)
    assert torch.equal(assemble(matrix, features, 4, 3, [0.6, 0.3]).dense(), matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certificate(dtype: torch.dtype) -> None:
    graph = random_graph(dtype=dtype)
    assert graph.certificate < 1e-15
    off = graph.preactivation.clone()
    off[3] += 0.25
    broken = replace(graph, preactivation=off)
    edges = graph.rows.row(3)[1].double()
    scale = float(edges.abs().sum() + graph.bias[3].abs() + off[3].abs())
    assert broken.certificate == pytest.approx(0.25 / scale, rel=1e-12)
    assert int(broken.residual.argmax()) == 3


@pytest.mark.parametrize("order", ["layers", "shuffled"])
def test_upward_edges_are_refused_in_any_order_of_features(order: str) -> None:
    graph = random_graph(count=40)
    graph = shuffled(graph) if order == "shuffled" else graph
    layer = graph.features[:, 0]
    assert bool((layer.diff() >= 0).all()) == (order == "layers")
    row = int((graph.row_node < graph.first_error).nonzero()[0, 0])
    dense_rows = graph.dense()[graph.row_node]
    same = int((layer == layer[graph.row_node[row]]).nonzero()[0, 0])
    dense_rows[row, same] = 1.0
    with pytest.raises(ValueError, match="edges from lower layers only"):
        replace(graph, rows=Rows.from_dense(dense_rows)[0])


def without_rows(features: int = 0, layers: int = 2, positions: int = 1, targets: int = 1) -> Graph:
    tokens = type(by_hand().tokens)(torch.arange(positions), [""] * positions)
    zero, none = torch.zeros(targets, dtype=torch.int64), torch.zeros(0)
    return Graph(
        features=torch.tensor([[0, 0, i] for i in range(features)], dtype=torch.int64).reshape(-1, 3),
        values=torch.ones(features), rows=Rows(torch.zeros(1, dtype=torch.int64), none.int(), none),
        row_node=none.long(), bias=none, preactivation=none,
        targets=Targets([""] * targets, zero, torch.ones(targets), zero), tokens=tokens, layers=layers,
    )  # fmt: skip


ODD = {
    "no_rows": lambda: without_rows(features=3),
    "no_features": lambda: random_graph(count=0),
    "no_features_no_rows": without_rows,
    "no_targets": lambda: random_graph(targets=0),
    "no_layers": lambda: without_rows(layers=0),
    "nothing": lambda: without_rows(0, 0, 0, 0),
    "one_position": lambda: random_graph(positions=1),
    "subnormal": lambda: with_rows(by_hand(), weight=torch.full((6,), 5e-324, dtype=torch.float64)),
}


@pytest.mark.parametrize("shares", [(0, 0), (0.8, 0.98), (1, 1), (0, 1), (1, 0)])
@pytest.mark.parametrize("name", ODD)
def test_odd_graphs(name: str, shares: tuple[float, float]) -> None:
    graph = ODD[name]()
    pruned = graph.prune(*shares)
    for variant in (
        graph,
        pruned.graph,
        graph.subgraph(np.zeros(graph.nodes, bool)),
        pruned.graph.prune(*shares).graph,
    ):
        assert 0 <= variant.certificate <= 1
        assert (variant.influence().numpy() >= 0).all()
        assert np.isfinite(variant.influence().numpy()).all()
        assert all(np.isnan(s) or 0 <= s <= 1 for s in variant.scores())
        assert variant.dense().shape == (variant.nodes, variant.nodes)
        assert (variant.to_scipy().toarray() == variant.dense().numpy()).all()
        assert variant.to_networkx().number_of_edges() == variant.rows.entries
    assert pruned.cumulative().numpy().max(initial=0) <= 1
    assert pruned.node_mask[graph.first_token :].all()


REFUSED = {
    "threshold_text": (lambda g: g.prune("a"), TypeError, "prune: node_threshold must be a number, got str"),
    "threshold_tensor": (lambda g: g.prune(0.5, torch.ones(1)), TypeError, r"edge_threshold must be .*\.item"),
    "mask_list": (lambda g: g.subgraph([True] * 6), TypeError, "node_mask must be a torch tensor, NumPy"),
    "mask_type": (lambda g: g.subgraph(np.ones(6)), TypeError, "node_mask must be bool, got float64"),
    "mask_size": (lambda g: g.subgraph(np.ones(5, bool)), ValueError, r"node_mask must have shape \[6\]"),
    "edge_mask_size": (
        lambda g: g.subgraph(np.ones(6, bool), np.ones(5, bool)), ValueError, r"edge_mask must have shape \[6\]",
    ),
    "path_text": (lambda g: g.paths("a", 0), TypeError, "source must be an int, got str"),
    "describe": (lambda g: g.describe(-1), ValueError, "node must be below 6 and not negative, got -1"),
    "describe_float": (lambda g: g.describe(1.5), TypeError, "node must be an int, got float"),
    "feature": (lambda g: g.feature_node(0, 0, 10**30), KeyError, "feature must be active"),
    "feature_text": (lambda g: g.feature_node(0, 0, "5"), TypeError, "feature must be an int, got str"),
    "error": (lambda g: g.error_node(1, 1), ValueError, "position must be below 1 and not negative, got 1"),
    "token": (lambda g: g.token_node(1), ValueError, "position must be below 1"),
    "target": (lambda g: g.target_node(1), ValueError, "target must be below 1"),
    "row": (lambda g: g.rows.row(-1), ValueError, "row must be below 3 and not negative, got -1"),
    "keep": (lambda g: Rows.from_dense(g.dense(), -1), ValueError, "keep must be zero or positive, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call(by_hand())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.floats(0, 1), st.integers(0, 99))
def test_properties(count: int, layers: int, positions: int, targets: int, density: float, seed: int) -> None:
    graph = random_graph(count, layers, positions, targets, density, seed)
    assert graph.certificate < 1e-14
    assert (graph.influence() >= 0).all()
    assert graph.influence()[graph.first_target :].sum() == 0
    few = graph.prune(0.5, 0.7)
    again = graph.prune(0.5, 0.7)
    assert torch.equal(few.node_mask, again.node_mask)
    assert torch.equal(few.edge_mask, again.edge_mask)
    assert few.graph.certificate < 1e-14


WRONG = {
    "upward": (lambda g: replace(g, row_node=torch.tensor([0, 1, 5])), "edges from lower layers only"),
    "row_of_error": (lambda g: replace(g, row_node=torch.tensor([2, 1, 0])), "row_node must be features"),
    "row_twice": (lambda g: replace(g, row_node=torch.tensor([5, 1, 1])), "name each node once"),
    "column": (lambda g: with_rows(g, column=g.rows.column + 4), "rows.column must be"),
    "descending": (lambda g: with_rows(g, column=g.rows.column.flip(0)), "must ascend within each row"),
    "nan": (lambda g: with_rows(g, weight=g.rows.weight * torch.nan), "rows.weight must be finite"),
    "bias": (lambda g: replace(g, bias=g.bias[:1]), "bias must have shape"),
    "layer": (lambda g: replace(g, layers=1), "row_node|features' layer"),
    "twice": (lambda g: replace(g, features=g.features[[0, 0]]), "features must be distinct"),
    "tokens": (lambda g: replace(g, tokens=type(g.tokens)(g.tokens.ids, ["a", "b"])), "tokens.ids must have shape"),
    "weights": (
        lambda g: replace(g, targets=type(g.targets)(["a"], g.targets.ids, -g.targets.weights, g.targets.positions)),
        "targets.weights must be finite and not negative",
    ),
    "provenance": (lambda g: replace(g, provenance={"a": torch.ones(1)}), "provenance must hold only what JSON can"),
    "probabilities": (
        lambda g: replace(g, provenance={"probabilities": {"3/1": 2.0}}),
        "provenance's probabilities must be numbers from 0 to 1 by token",
    ),
    "timings": (lambda g: replace(g, timings={"a": float("nan")}), "timings must hold only what JSON can"),
    "mass": (lambda g: replace(g, dropped_mass=-torch.ones(3)), "dropped_mass must not be negative"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_graphs_are_refused(name: str) -> None:
    change, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        change(by_hand())
