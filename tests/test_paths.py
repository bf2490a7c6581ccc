"""Tests of the strongest paths against all paths."""

from __future__ import annotations

import itertools

import pytest
import torch
from graph_references import SEEDS, normalised
from graphs import assemble, by_hand, random_graph
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


def all_paths(share: Tensor, source: int, node: int) -> list[tuple[float, tuple[int, ...]]]:
    if node == source:
        return [(1.0, (source,))]
    paths = []
    for before in share[node].nonzero()[:, 0].tolist():
        ways = all_paths(share, source, before)
        paths += [(s * float(share[node, before]), (*way, node)) for s, way in ways]
    return paths


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 7, 10_000])
def test_paths_are_the_strongest(k: int, seed: int) -> None:
    graph = random_graph(count=14, layers=4, positions=2, seed=seed)
    share = normalised(graph.dense())
    for source, target in [(graph.token_node(0), graph.target_node(0)), (graph.error_node(0, 0), graph.target_node(1))]:
        truth = sorted(all_paths(share, source, target), key=lambda p: -p[0])[:k]
        got = graph.paths(source, target, k)
        assert [p.strength for p in got] == pytest.approx([s for s, _ in truth])
        assert {p.nodes for p in got} == {way for _, way in truth}
        for path in got:
            edges = [float(graph.dense()[t, s]) for s, t in itertools.pairwise(path.nodes)]
            assert list(path.weights) == edges


def test_paths_that_tie() -> None:
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[5, [0, 1, 2]] = 1
    matrix[[0, 1, 2], 4] = 1
    graph = assemble(matrix, [[0, 0, 0], [0, 0, 1], [0, 0, 2]], 1, 1, [1.0])
    assert [p.nodes for p in graph.paths(4, 5, 2)] == [(4, 0, 5), (4, 1, 5)]


def test_paths_to_oneself_and_to_nowhere() -> None:
    graph = by_hand()
    assert graph.paths(1, 1, 3) == [((1,), (), 1.0)]
    assert graph.paths(graph.target_node(0), 0, 1) == []
    assert graph.paths(4, 5, 9)[0] == ((4, 0, 1, 5), (4.0, 2.0, 3.0), pytest.approx(0.3))
    with pytest.raises(ValueError, match="source must be a node below 6, got 6"):
        graph.paths(6, 0, 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        graph.paths(4, 5, 0)
