"""The graph itself: order of nodes, the law, influence, pruning, scores and paths against slow truths."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from graphs import assemble, by_hand, random_features, random_graph, random_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pycircuit as pc
from pycircuit.graph import Graph, Rows
from pycircuit.graph.threshold import cumulative, cutoff

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = range(12)


def weights_of(graph: Graph) -> Tensor:
    out = torch.zeros(graph.nodes, dtype=torch.float64)
    out[graph.first_target :] = graph.targets.weights
    return out


def normalised(matrix: Tensor) -> Tensor:
    size = matrix.abs().double()
    return size / size.sum(1, keepdim=True).clamp_min(1e-300)


def influence_by_inverse(matrix: Tensor, weights: Tensor) -> Tensor:
    """Every path at once: weights @ ((I - A)^-1 - I)."""
    eye = torch.eye(len(matrix), dtype=torch.float64)
    return weights @ (torch.linalg.inv(eye - normalised(matrix)) - eye)


def keep_share(scores: Tensor, share: float) -> Tensor:
    """By a full sort: the largest scores whose sum reaches the share, and those equal to the last."""
    if not scores.sum() > 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ordered = scores.flatten().sort(descending=True).values
    if share == 1:
        return scores > 0
    reached = ordered.cumsum(0) >= share * ordered.sum() * (1 - 1e-12)
    return scores >= ordered[int(reached.nonzero()[0])] * (1 - 1e-12)


def prune_slowly(graph: Graph, node_share: float, edge_share: float) -> tuple[Tensor, Tensor]:
    """(nodes, edges as [nodes, nodes]), one step after another on the dense matrix."""
    matrix, weights = graph.dense().double(), weights_of(graph)
    nodes = keep_share(influence_by_inverse(matrix, weights), node_share)
    nodes[graph.first_token :] = True
    inside = matrix * nodes[:, None] * nodes
    edges = keep_share(normalised(inside) * (influence_by_inverse(inside, weights) + weights)[:, None], edge_share)
    for _ in range(graph.nodes):
        for i in range(graph.first_token):
            fed = bool(edges[i].any()) or i >= graph.first_error
            if nodes[i] and not (fed and edges[:, i].any()):
                nodes[i] = False
                edges[i], edges[:, i] = False, False
    return nodes, edges


def edges_of(graph: Graph, mask: Tensor) -> Tensor:
    out = torch.zeros(graph.nodes, graph.nodes, dtype=torch.bool)
    row = graph.row_node[torch.from_numpy(graph.rows.row_of_entry()).long()]
    out[row[mask], graph.rows.column[mask].long()] = True
    return out


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


@pytest.mark.parametrize("keep", [0, 1, 5, 1000])
def test_compressed_rows_keep_the_law(keep: int) -> None:
    features = random_features(30, 4, 3, 2)
    matrix = random_matrix(features, 4, 3, 2, 0.7, 2)
    whole = assemble(matrix, features, 4, 3, [0.6, 0.3])
    rows, dropped, mass = Rows.from_dense(matrix[whole.row_node], keep)
    graph = replace(whole, rows=rows, dropped=dropped, dropped_mass=mass)
    assert graph.certificate < 1e-15
    assert int(rows.lengths().max()) <= keep
    left = matrix[whole.row_node].abs().sum(1) - torch.from_numpy(rows.sums(rows.magnitudes()))
    assert torch.allclose(mass, left, atol=1e-12)
    if keep < 5:
        assert replace(graph, dropped=None).certificate > 1e-3


def test_compression_keeps_lower_columns_among_equals() -> None:
    rows, dropped, mass = Rows.from_dense(torch.tensor([[1.0, -2.0, 1.0, 2.0, 1.0, 0.0]]), 3)
    assert rows.column.tolist() == [0, 1, 3]
    assert (dropped.tolist(), mass.tolist()) == ([2.0], [2.0])


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
    kept = torch.from_numpy(pruned.influence.numpy() > 0)
    assert not pruned.node_mask[: graph.first_token][~kept[: graph.first_token]].any()


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
    kept = keep_share(torch.from_numpy(scores), share).numpy()
    assert ((scores >= cutoff(scores, share)) == kept).all()


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6) | st.sampled_from([0.0, 0.1, 0.5]), min_size=1, max_size=60), st.floats(0, 1))
def test_cutoff_reaches_the_share_and_no_more(scores: list[float], share: float) -> None:
    s = np.array(scores)
    at = cutoff(s, share)
    if s.sum() > 0:
        assert s[s >= at].sum() >= share * s.sum() * (1 - 1e-9)
        assert share == 0 or s[s > at * (1 + 1e-11)].sum() <= share * s.sum() * (1 + 1e-9)


def test_cumulative_equals_a_sort() -> None:
    scores = np.random.default_rng(1).integers(0, 40, 500) / 3
    wanted = np.arange(0, 500, 7)
    truth = [scores[scores >= scores[w]].sum() / scores.sum() for w in wanted]
    assert cumulative(scores, wanted) == pytest.approx(truth)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_thresholds_outside(share: float) -> None:
    with pytest.raises(ValueError, match="node_threshold must be from 0 to 1"):
        by_hand().prune(share)
    with pytest.raises(ValueError, match="edge_threshold must be from 0 to 1"):
        by_hand().prune(0.8, share)


def test_scores_by_hand() -> None:
    # Token 0.5, errors 0.5. Unexplained: 1/5 of the target's 1, half of f1's 0.6, of 3.1 in all.
    assert by_hand().scores() == pytest.approx((0.5, 1 - (0.2 + 0.3) / 3.1))


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_equal_the_definition(seed: int) -> None:
    graph = random_graph(seed=seed, targets=3)
    matrix, weights = graph.dense(), weights_of(graph)
    found = influence_by_inverse(matrix, weights)
    errors = slice(graph.first_error, graph.first_token)
    tokens = found[graph.first_token : graph.first_target].sum()
    explained, reaching = 1 - normalised(matrix)[:, errors].sum(1), found + weights
    got = graph.scores()
    assert got.replacement == pytest.approx(float(tokens / (tokens + found[errors].sum())))
    assert got.completeness == pytest.approx(float((explained * reaching).sum() / reaching.sum()))


@pytest.mark.parametrize("seed", SEEDS)
def test_subgraph(seed: int) -> None:
    graph = random_graph(seed=seed)
    mask = torch.rand(graph.nodes, generator=torch.Generator().manual_seed(seed)) < 0.6
    part = graph.subgraph(mask)
    places = mask.clone()
    places[graph.first_error : graph.first_target] = True
    assert torch.equal(part.dense(), (graph.dense() * mask[:, None] * mask)[places][:, places])
    assert torch.equal(part.features, graph.features[mask[: graph.first_error]])
    assert part.certificate < 1e-15
    assert len(part.targets) == int(mask[graph.first_target :].sum())


def test_pruned_graph_keeps_the_law_and_the_influence_of_its_edges() -> None:
    graph = random_graph(count=60, seed=4)
    pruned = graph.prune(0.7, 0.9)
    assert 0 < len(pruned.graph.features) < len(graph.features)
    assert pruned.graph.rows.entries == int(pruned.edge_mask.sum())
    assert pruned.graph.certificate < 1e-15


def all_paths(share: Tensor, source: int, node: int) -> list[tuple[float, tuple[int, ...]]]:
    if node == source:
        return [(1.0, (source,))]
    found = []
    for before in share[node].nonzero()[:, 0].tolist():
        ways = all_paths(share, source, before)
        found += [(s * float(share[node, before]), (*way, node)) for s, way in ways]
    return found


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
        dropped=None, dropped_mass=None,
    )  # fmt: skip
    assert graph.nodes == sources + 1
    assert graph.prune().node_mask[:2].tolist() == [True, True]
    assert graph.scores().replacement == pytest.approx(1 / 6 / (1 / 6 + 5 / 6))
    assert graph.to_scipy().nnz == 5
    assert graph.paths(sources - 1, sources, 1)[0].nodes == (sources - 1, 1, sources)


def with_rows(graph: Graph, **changes: Tensor) -> Graph:
    parts = {"row_ptr": graph.rows.row_ptr, "column": graph.rows.column, "weight": graph.rows.weight}
    return replace(graph, rows=Rows(**{**parts, **changes}))


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
    "timings": (lambda g: replace(g, timings={"a": float("nan")}), "timings must hold only what JSON can"),
    "mass": (lambda g: replace(g, dropped_mass=-torch.ones(3)), "dropped_mass must not be negative"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_graphs_are_refused(name: str) -> None:
    change, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        change(by_hand())
