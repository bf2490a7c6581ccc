"""Tests of the strongest paths against all paths."""

from __future__ import annotations

import itertools

import pytest
import torch
from graph_references import SEEDS, normalised
from graphs import assemble, by_hand, random_graph
from torch import Tensor

from pycircuit.graph import Graph
from pycircuit.graph.paths import strongest_path

pytestmark = pytest.mark.usefixtures("one_thread")


def all_paths(matrix: Tensor, source: int, node: int) -> list[tuple[int, ...]]:
    """Every path from a source to a node, by its nodes."""
    if node == source:
        return [(source,)]
    sources = matrix[node].nonzero()[:, 0].tolist()
    return [(*way, node) for before in sources for way in all_paths(matrix, source, before)]


def measured(matrix: Tensor, nodes: tuple[int, ...]) -> tuple[int, float]:
    """(sign, strength) of a path, from the definition."""
    share, sign, total = normalised(matrix), 1, 0.0
    for before, node in itertools.pairwise(nodes):
        sign *= 1 if matrix[node, before] > 0 else -1
        total += float(share[node, before]) ** -8
    return sign, total ** (-1 / 8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 7, 10_000])
def test_paths_are_the_strongest(k: int, seed: int) -> None:
    graph = random_graph(count=14, layers=4, positions=2, seed=seed)
    matrix = graph.dense()
    for source, target in [(graph.token_node(0), graph.target_node(0)), (graph.error_node(0, 0), graph.target_node(1))]:
        every = {way: measured(matrix, way) for way in all_paths(matrix, source, target)}
        for sign in (None, 1, -1):
            wanted = [way for way, (s, _) in every.items() if sign in (None, s)]
            truth = sorted(wanted, key=lambda way: -every[way][1])[:k]
            got = graph.paths(source, target, k, sign)
            assert [p.strength for p in got] == pytest.approx([every[way][1] for way in truth])
            assert {p.nodes for p in got} == set(truth)
            for path in got:
                assert path.sign == every[path.nodes][0]
                edges = [float(matrix[t, s]) for s, t in itertools.pairwise(path.nodes)]
                assert list(path.weights) == edges


@pytest.mark.parametrize("seed", SEEDS)
def test_the_strongest_path_from_a_token(seed: int) -> None:
    """One pass from the target finds the best of all supporting paths from all tokens."""
    graph = random_graph(count=40, layers=4, positions=5, seed=seed)
    for target in range(2):
        node = graph.target_node(target)
        best = [graph.paths(graph.token_node(p), node, 1, 1) for p in range(1, 5)]
        earlier = max((p.strength for paths in best[:-1] for p in paths), default=0.0)
        own = best[-1][0].strength if best[-1] else 0.0
        path = strongest_path(graph, target, least=0)
        assert path is not None and path.sign == 1
        assert path.strength == pytest.approx(own if own > 2 * earlier else earlier)
        strongest = float(normalised(graph.dense())[node, : graph.first_error].max())
        threshold = path.strength / strongest
        assert strongest_path(graph, target, 0.5 * threshold) is not None
        assert strongest_path(graph, target, 4 * threshold) is None


def planted(noise: float, length: int = 5) -> tuple[Graph, list[int]]:
    """A circuit of `length` features, two fifths of their input, and a token that feeds the last one by itself.

    Everything else that enters a feature or the target is errors, and a short cut from token to target of `noise`.
    """
    features = [[layer, 0, layer] for layer in range(length)] + [[0, 0, 99]]
    n = len(features)
    token, target = n + length, n + length + 1
    matrix = torch.zeros(target + 1, target + 1, dtype=torch.float64)
    for layer in range(length):
        matrix[layer, layer - 1 if layer else token] = 0.4
        matrix[layer, n : n + max(layer, 1)] = 0.6 / max(layer, 1)
    matrix[n - 1, token] = 1
    matrix[target, [length - 1, n - 1]] = torch.tensor([0.4, noise], dtype=torch.float64)
    matrix[target, n : n + length] = (0.6 - noise) / length
    return assemble(matrix, features, length, 1, [1.0]), [token, *range(length), target]


@pytest.mark.parametrize("length", [2, 5, 20])
def test_a_planted_circuit_beats_a_short_cut(length: int) -> None:
    """Even where the product of shares is a million times smaller; a short cut as strong wins, as it should."""
    graph, circuit = planted(0.15, length)
    assert list(graph.paths(circuit[0], circuit[-1])[0].nodes) == circuit
    path = strongest_path(graph)
    assert path is not None and list(path.nodes) == circuit
    graph, circuit = planted(0.41, length)
    assert len(graph.paths(circuit[0], circuit[-1])[0].nodes) == 3


def test_paths_against_are_told_apart() -> None:
    """The strongest chain opposes the target: it is no answer to what supports it, and an inhibited inhibitor is."""
    matrix = torch.zeros(9, 9, dtype=torch.float64)
    matrix[8, [0, 1, 2]] = torch.tensor([-5.0, 1, -2], dtype=torch.float64)
    matrix[[0, 1], 7] = 1
    matrix[2, 1] = -1
    graph = assemble(matrix, [[0, 0, 0], [0, 0, 1], [1, 0, 2]], 4, 1, [1.0])
    assert [(p.nodes, p.sign) for p in graph.paths(7, 8, 9)] == [((7, 0, 8), -1), ((7, 1, 2, 8), 1), ((7, 1, 8), 1)]
    assert [p.nodes for p in graph.paths(7, 8, 9, sign=-1)] == [(7, 0, 8)]
    path = strongest_path(graph)
    assert path is not None and path.nodes == (7, 1, 2, 8)


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
    assert graph.paths(4, 5, 9)[0] == ((4, 0, 1, 5), (4.0, 2.0, 3.0), pytest.approx((1 + 0.5**-8 + 0.6**-8) ** -0.125))
    with pytest.raises(ValueError, match="source must be a node below 6, got 6"):
        graph.paths(6, 0, 1)
    assert graph.paths(3, 5, 1)[0].sign == -1
    with pytest.raises(ValueError, match="k must be at least 1"):
        graph.paths(4, 5, 0)
    with pytest.raises(ValueError, match="sign must be 1, -1 or None, got 0"):
        graph.paths(4, 5, 1, sign=0)  # type: ignore[arg-type]
