"""The graph itself: order of nodes, the law, influence, pruning, scores and paths against slow truths."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from graphs import assemble, by_hand, cone_graph, random_features, random_graph, random_matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pycircuit as pc
from pycircuit.graph import Graph, Rows, Targets
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
    inner, errors = torch.arange(graph.nodes) < graph.first_token, torch.arange(graph.nodes) >= graph.first_error
    while (dead := nodes & inner & ~((edges.any(1) | errors) & edges.any(0))).any():
        nodes &= ~dead
        edges[dead], edges[:, dead] = False, False
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("keep", [None, 0, 1, 3, 17, 29, 30, 31])
def test_from_dense_equals_a_sort(keep: int | None, dtype: type) -> None:
    """Many equal sizes, zeros, an empty and a full row; strided, too."""
    drawn = np.random.default_rng(5).integers(-4, 5, (40, 30)).astype(dtype)
    drawn[3], drawn[4] = 0, 2
    for matrix in (drawn, np.asfortranarray(drawn), np.repeat(drawn, 2, 1)[:, ::2]):
        rows, dropped, mass = Rows.from_dense(matrix, keep)
        assert rows.weight.numpy().dtype == dtype
        for r, row in enumerate(drawn):
            order = sorted(np.flatnonzero(row).tolist(), key=lambda c: (-abs(row[c]), c))
            kept = sorted(order[:keep])
            column, weight = rows.row(r)
            assert column.tolist() == kept
            assert weight.tolist() == row[kept].tolist()
            left = row[order[len(kept) :]].astype(np.float64)
            assert (float(dropped[r]), float(mass[r])) == (left.sum(), np.abs(left).sum())


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_compression_hides_no_nan(keep: int | None) -> None:
    rows, dropped, mass = Rows.from_dense(torch.tensor([[1.0, torch.nan, 3.0, torch.nan]]), keep)
    assert np.isnan(rows.masses()[0] + float(dropped[0]) + float(mass[0]))


def test_trusted_rows_are_taken_as_they_are() -> None:
    """Nothing is copied or looked at, and a graph still refuses what would make its numbers wrong."""
    graph = random_graph()
    parts = (graph.rows.row_ptr, graph.rows.column, graph.rows.weight)
    rows = Rows.trusted(*parts)
    assert all(a is b for a, b in zip(parts, (rows.row_ptr, rows.column, rows.weight), strict=True))
    again = replace(graph, rows=rows)
    assert again.rows is rows
    assert torch.equal(again.dense(), graph.dense())
    for weight, column, message in (
        (parts[2] * torch.inf, parts[1], "rows.weight must be finite"),
        (parts[2], parts[1] + graph.nodes, "rows.column must be"),
        (parts[2], parts[1] - graph.nodes, "rows.column must be"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(graph, rows=Rows.trusted(parts[0], column, weight))


@pytest.mark.parametrize("at", [1, 65_535, 65_536, 65_537, 131_071, 131_072, 149_999])
def test_one_fall_anywhere_is_found(at: int) -> None:
    column = torch.arange(150_000)
    column[at] = column[at - 1]
    with pytest.raises(ValueError, match=f"must ascend within each row, got {at - 1} after {at - 1} at {at}"):
        Rows(torch.tensor([0, 150_000]), column, torch.ones(150_000))
    column = torch.arange(150_000)
    column[at:] -= at
    assert Rows(torch.tensor([0, at, at, 150_000]), column, torch.ones(150_000)).count == 3
    with pytest.raises(ValueError, match="must ascend"):
        Rows(torch.tensor([0, at - 1, 150_000]), column, torch.ones(150_000))


def shuffled(graph: Graph) -> Graph:
    """The same graph with its features in no order."""
    order = torch.randperm(len(graph.features), generator=torch.Generator().manual_seed(0))
    number = torch.cat([order.argsort(), torch.arange(len(order), graph.nodes)])
    whole = graph.dense()[graph.row_node]
    whole[:, number[: graph.first_target]] = whole[:, : graph.first_target].clone()
    rows, _, _ = Rows.from_dense(whole)
    return replace(
        graph, features=graph.features[order], values=graph.values[order], rows=rows, row_node=number[graph.row_node]
    )


@pytest.mark.parametrize("order", ["layers", "shuffled"])
def test_upward_edges_are_refused_in_any_order_of_features(order: str) -> None:
    graph = random_graph(count=40)
    graph = shuffled(graph) if order == "shuffled" else graph
    layer = graph.features[:, 0]
    assert bool((layer.diff() >= 0).all()) == (order == "layers")
    row = int((graph.row_node < graph.first_error).nonzero()[0, 0])
    whole = graph.dense()[graph.row_node]
    same = int((layer == layer[graph.row_node[row]]).nonzero()[0, 0])
    whole[row, same] = 1.0
    with pytest.raises(ValueError, match="edges from lower layers only"):
        replace(graph, rows=Rows.from_dense(whole)[0])


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
        part = pruned.graph
        places = nodes.clone()
        places[graph.first_error : graph.first_target] = True
        assert torch.equal(part.dense(), (dense * edges)[places][:, places])
        assert part.certificate < 1e-14


@pytest.mark.parametrize("k", [1, 3, 12])
def test_paths_of_a_large_graph(large: Graph, k: int) -> None:
    """By the same recursion over whole columns: the k best into each node, in the order of layers."""
    share, layer = normalised(large.dense()), large.features[:, 0]
    source, target = large.token_node(2), large.target_node(3)
    best: dict[int, list[tuple[float, tuple[int, ...]]]] = {source: [(1.0, (source,))]}
    inner = sorted(range(large.first_error), key=lambda n: int(layer[n]))
    for node in [*inner, target]:
        found = [
            (s * float(share[node, before]), (*way, node))
            for before in share[node].nonzero()[:, 0].tolist()
            for s, way in best.get(before, [])
        ]
        best[node] = sorted(found, key=lambda p: -p[0])[:k]
    got = large.paths(source, target, k)
    assert [p.strength for p in got] == pytest.approx([s for s, _ in best[target]])
    assert [p.nodes for p in got] == [way for _, way in best[target]]


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
    for each in (graph, pruned.graph, graph.subgraph(np.zeros(graph.nodes, bool)), pruned.graph.prune(*shares).graph):
        assert 0 <= each.certificate <= 1
        assert (each.influence().numpy() >= 0).all()
        assert np.isfinite(each.influence().numpy()).all()
        assert all(np.isnan(s) or 0 <= s <= 1 for s in each.scores())
        assert each.dense().shape == (each.nodes, each.nodes)
        assert (each.to_scipy().toarray() == each.dense().numpy()).all()
        assert each.to_networkx().number_of_edges() == each.rows.entries
    assert pruned.cumulative().numpy().max(initial=0) <= 1
    assert pruned.node_mask[graph.first_token :].all()


def test_subgraph_of_a_pruned_graph() -> None:
    graph = random_graph(count=60, seed=4)
    few = graph.prune(0.7, 0.9).graph
    again = few.subgraph(np.ones(few.nodes, bool), np.ones(few.rows.entries, bool))
    assert torch.equal(again.dense(), few.dense())
    inner = few.prune(0.5, 0.5)
    assert 0 < inner.graph.rows.entries < few.rows.entries
    assert inner.graph.certificate < 1e-14
    kept = {tuple(f) for f in inner.graph.features.tolist()}
    assert kept < {tuple(f) for f in few.features.tolist()}


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
        dropped=None, dropped_mass=None, product_norm=None,
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
