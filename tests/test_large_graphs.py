"""Tests of graphs of many blocks of rows: dense references and memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
import torch
from graph_references import edges_of, influence_by_inverse, normalised, prune_slowly, shuffled, weights_of
from graphs import by_hand, cone_graph

from pycircuit.graph import Graph, Rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def large() -> Graph:
    """Rows enough for several blocks, scattered over the layers, and small enough for the dense truths."""
    graph = cone_graph(4, 14, 12, 450, dtype=torch.float64)
    assert graph.rows.entries > 65_536
    assert len(list(graph.rows.blocks())) > 1
    return graph


@pytest.mark.parametrize("order", ["layers", "shuffled"])
def test_large_graphs_by_their_dense_matrix(large: Graph, order: str) -> None:
    graph = large if order == "layers" else shuffled(large)
    dense, weights = graph.dense(), weights_of(graph)
    assert graph.certificate < 1e-14
    assert torch.allclose(graph.influence(), influence_by_inverse(dense, weights), atol=1e-14)
    assert torch.equal(torch.from_numpy(graph.to_scipy().toarray()), dense)
    for shares in ((0.8, 0.98), (0.4, 0.3), (1, 1)):
        nodes, edges = prune_slowly(graph, *shares)
        pruned = graph.prune(*shares)
        assert torch.equal(pruned.node_mask, nodes)
        assert torch.equal(edges_of(graph, pruned.edge_mask), edges)
        pruned_graph = pruned.graph
        places = nodes.clone()
        places[graph.first_error : graph.first_target] = True
        assert torch.equal(pruned_graph.dense(), (dense * edges)[places][:, places])
        assert pruned_graph.certificate < 1e-14


@pytest.mark.parametrize("k", [1, 3, 12])
def test_paths_of_a_large_graph(large: Graph, k: int) -> None:
    """By the same recursion over whole columns: the k best of each sign into each node, in the order of layers."""
    dense, layer = large.dense(), large.features[:, 0]
    share = normalised(dense)
    source, target = large.token_node(2), large.target_node(3)
    best: dict[int, list[tuple[float, int, tuple[int, ...]]]] = {source: [(0.0, 1, (source,))]}
    inner = sorted(range(large.first_error), key=lambda n: int(layer[n]))
    for node in [*inner, target]:
        candidates = [
            (cost + float(share[node, before]) ** -8, sign * (1 if dense[node, before] > 0 else -1), (*way, node))
            for before in share[node].nonzero()[:, 0].tolist()
            for cost, sign, way in best.get(before, [])
        ]
        candidates.sort(key=lambda p: p[0])
        best[node] = [p for sign in (1, -1) for p in [q for q in candidates if q[1] == sign][:k]]
    for sign in (1, -1):
        got = large.paths(source, target, k, sign)
        truth = [p for p in best[target] if p[1] == sign]
        assert [p.strength for p in got] == pytest.approx([cost**-0.125 for cost, _, _ in truth])
        assert [p.nodes for p in got] == [way for _, _, way in truth]


LIMITS = {"certificate": 0.3, "influence": 0.3, "scores": 0.3, "paths": 0.3, "prune": 1.5}  # of the rows' own bytes


@pytest.mark.parametrize("what", LIMITS)
def test_memory_of_a_large_graph(what: str) -> None:
    """Temporary arrays of a few blocks, however many entries there are; pruning may hold what it chooses from."""
    graph = cone_graph(8, 60, 16, 300)
    own = graph.rows.entries * 8
    assert own > 2**22
    calls = {
        "certificate": lambda: graph.certificate,
        "influence": graph.influence,
        "scores": graph.scores,
        "paths": lambda: graph.paths(graph.token_node(1), graph.target_node(0), 5),
        "prune": lambda: (graph.prune(), graph.prune(1, 1)),
    }
    calls[what]()
    tracemalloc.start()
    calls[what]()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LIMITS[what] * own + 2**22


def test_no_array_of_nodes_by_nodes() -> None:
    """Everything but dense() works on a graph whose dense matrix would be 130 GB."""
    positions, layers = 4096, 30
    sources = (layers + 1) * positions + 2
    rows = Rows(
        torch.tensor([0, 2, 4, 5]), torch.tensor([0, 1, 0, sources - 1, 2]), torch.tensor([1.0, -2.0, 3.0, 1.0, 2.0])
    )
    tokens = type(by_hand().tokens)(torch.zeros(positions, dtype=torch.int64), [""] * positions)
    graph = replace(
        by_hand(), features=torch.tensor([[0, 0, 1], [1, 0, 1]]), layers=layers, tokens=tokens, rows=rows,
        row_node=torch.tensor([sources, 1, 0]), bias=torch.zeros(3), preactivation=torch.zeros(3),
        dropped=None, dropped_mass=None, product_norm=None,
    )  # fmt: skip
    assert graph.nodes == sources + 1
    assert graph.prune().node_mask[:2].tolist() == [True, True]
    assert graph.scores().replacement == pytest.approx(1 / 6 / (1 / 6 + 5 / 6))
    assert graph.to_scipy().nnz == 5
    assert graph.paths(sources - 1, sources, 1)[0].nodes == (sources - 1, 1, sources)
