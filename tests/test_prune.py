"""Tests of influence, pruning, thresholds, scores and subgraphs against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_references import SEEDS, edges_of, influence_by_inverse, keep_share, normalised, prune_slowly, weights_of
from graphs import assemble, by_hand, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from pycircuit.graph.threshold import cumulative, cutoff

pytestmark = pytest.mark.usefixtures("one_thread")


def test_subgraph_of_a_pruned_graph() -> None:
    graph = random_graph(count=60, seed=4)
    few = graph.prune(0.7, 0.9).graph
    again = few.subgraph(np.ones(few.nodes, bool), np.ones(few.rows.entries, bool))
    assert torch.equal(again.dense(), few.dense())
    inner = few.prune(0.5, 0.5)
    assert 0 < inner.graph.rows.entries < few.rows.entries
    assert inner.graph.certificate < 1e-14
    remaining = {tuple(f) for f in inner.graph.features.tolist()}
    assert remaining < {tuple(f) for f in few.features.tolist()}


def test_influence_by_hand() -> None:
    # Shares: the target takes 3/5 from f1, 1/5 from f0, 1/5 from e1; f1 half from f0, half from e0.
    got = by_hand().influence()
    assert torch.allclose(got, torch.tensor([0.5, 0.6, 0.3, 0.2, 0.5, 0], dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize("seed", SEEDS)
def test_influence_is_the_inverse(seed: int) -> None:
    graph = random_graph(seed=seed)
    assert torch.allclose(graph.influence(), influence_by_inverse(graph.dense(), weights_of(graph)), atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shares", [(0.8, 0.98), (0.5, 0.5), (0, 0), (1, 1), (0, 1), (1, 0), (0.95, 0.3)])
def test_masks_equal_the_textbook(shares: tuple[float, float], seed: int) -> None:
    graph = random_graph(count=60, layers=5, density=(0.1, 0.4, 0.9)[seed % 3], seed=seed)
    nodes, edges = prune_slowly(graph, *shares)
    pruned = graph.prune(*shares)
    assert torch.equal(pruned.node_mask, nodes)
    assert torch.equal(edges_of(graph, pruned.edge_mask), edges)


def test_prune_by_hand() -> None:
    graph = by_hand()
    # Node influences 0.6 + 0.5 + 0.5 of 2.1 reach 0.76: f1, f0 and the token; then nothing comes from an error.
    pruned = graph.prune(0.76, 1.0)
    assert pruned.node_mask.tolist() == [True, True, False, False, True, True]
    assert pruned.graph.scores() == (1.0, 1.0)
    assert pruned.cumulative().tolist() == pytest.approx([1.6 / 2.1, 0.6 / 2.1, 1.6 / 2.1, 1.0])


def test_find_threshold_of_one() -> None:
    """A share of 1 keeps all that has influence and nothing that has none, whatever the rounding of the sums."""
    for scores in (np.array([0.1] * 10), np.array([1.0, 1e-30, 0.0]), np.array([0.0, 3.0])):
        assert ((scores >= cutoff(scores, 1.0)) == (scores > 0)).all()
    graph = random_graph(seed=5)
    pruned = graph.prune(1.0, 1.0)
    remaining = torch.from_numpy(pruned.influence.numpy() > 0)
    assert not pruned.node_mask[: graph.first_token][~remaining[: graph.first_token]].any()


def test_rounding_does_not_part_equal_scores() -> None:
    scores = np.array([0.1 + 0.2, 0.3, 0.05])
    assert scores[0] != scores[1]
    assert (scores >= cutoff(scores, 0.3)).tolist() == [True, True, False]


def test_threshold_of_zero_keeps_the_strongest() -> None:
    assert cutoff(np.array([1.0, 5.0, 5.0, 2.0]), 0.0) == pytest.approx(5.0, rel=1e-11)


def test_nothing_has_influence() -> None:
    assert cutoff(np.zeros(4), 0.5) == np.inf
    graph = assemble(torch.zeros(6, 6), [[0, 0, 1], [1, 0, 1]], 2, 1, [1.0])
    pruned = graph.prune()
    assert pruned.node_mask.tolist() == [False] * 4 + [True] * 2
    assert not pruned.edge_mask.any()
    assert all(np.isnan(graph.scores()) == [True, False])
    assert graph.certificate == 0


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.3, 0.8, 0.98, 0.999999, 1.0])
@pytest.mark.parametrize("kind", ["uniform", "exponential", "ties", "wide", "one", "tiny"])
def test_cutoff_equals_a_sort(kind: str, share: float) -> None:
    g = np.random.default_rng(3)
    scores = {
        "uniform": lambda: g.random(50_000),
        "exponential": lambda: g.exponential(size=50_000) ** 3,
        "ties": lambda: g.integers(0, 5, 50_000) / 7,
        "wide": lambda: 10.0 ** g.uniform(-300, 300, 50_000),
        "one": lambda: np.ones(50_000) * 0.1,
        "tiny": lambda: np.full(50_000, 5e-324) * g.integers(0, 2, 50_000),
    }[kind]()
    remaining = keep_share(torch.from_numpy(scores), share).numpy()
    assert ((scores >= cutoff(scores, share)) == remaining).all()


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6) | st.sampled_from([0.0, 0.1, 0.5]), min_size=1, max_size=60), st.floats(0, 1))
def test_cutoff_reaches_the_share_and_no_more(scores: list[float], share: float) -> None:
    s = np.array(scores)
    index = cutoff(s, share)
    if s.sum() > 0:
        assert s[s >= index].sum() >= share * s.sum() * (1 - 1e-9)
        assert share == 0 or s[s > index * (1 + 1e-11)].sum() <= share * s.sum() * (1 + 1e-9)


def test_cumulative_equals_a_sort() -> None:
    scores = np.random.default_rng(1).integers(0, 40, 500) / 3
    wanted = np.arange(0, 500, 7)
    truth = [scores[scores >= scores[w]].sum() / scores.sum() for w in wanted]
    assert cumulative(scores, wanted) == pytest.approx(truth)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_thresholds_outside(share: float) -> None:
    with pytest.raises(ValueError, match=r"node_threshold must be (from 0 to 1|a number, got NaN)"):
        by_hand().prune(share)
    with pytest.raises(ValueError, match=r"edge_threshold must be (from 0 to 1|a number, got NaN)"):
        by_hand().prune(0.8, share)


def test_scores_by_hand() -> None:
    # Token 0.5, errors 0.5. Unexplained: 1/5 of the target's 1, half of f1's 0.6, of 3.1 in all.
    assert by_hand().scores() == pytest.approx((0.5, 1 - (0.2 + 0.3) / 3.1))


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_equal_the_definition(seed: int) -> None:
    graph = random_graph(seed=seed, targets=3)
    matrix, weights = graph.dense(), weights_of(graph)
    result = influence_by_inverse(matrix, weights)
    errors = slice(graph.first_error, graph.first_token)
    tokens = result[graph.first_token : graph.first_target].sum()
    explained, reaching = 1 - normalised(matrix)[:, errors].sum(1), result + weights
    got = graph.scores()
    assert got.replacement == pytest.approx(float(tokens / (tokens + result[errors].sum())))
    assert got.completeness == pytest.approx(float((explained * reaching).sum() / reaching.sum()))


@pytest.mark.parametrize("seed", SEEDS)
def test_subgraph(seed: int) -> None:
    graph = random_graph(seed=seed)
    mask = torch.rand(graph.nodes, generator=torch.Generator().manual_seed(seed)) < 0.6
    subset = graph.subgraph(mask)
    places = mask.clone()
    places[graph.first_error : graph.first_target] = True
    assert torch.equal(subset.dense(), (graph.dense() * mask[:, None] * mask)[places][:, places])
    assert torch.equal(subset.features, graph.features[mask[: graph.first_error]])
    assert subset.certificate < 1e-15
    assert len(subset.targets) == int(mask[graph.first_target :].sum())


def test_pruned_graph_keeps_the_law_and_the_influence_of_its_edges() -> None:
    graph = random_graph(count=60, seed=4)
    pruned = graph.prune(0.7, 0.9)
    assert 0 < len(pruned.graph.features) < len(graph.features)
    assert pruned.graph.rows.entries == int(pruned.edge_mask.sum())
    assert pruned.graph.certificate < 1e-15
