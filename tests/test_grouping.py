"""Groups by structure, scores of selections, and stability, against slow references."""

from __future__ import annotations

from dataclasses import replace

import networkx
import numpy as np
import pytest
import torch
from graph_references import normalised, weights_of
from graphs import by_hand, cone_graph, random_graph

from pycircuit.graph import Graph
from pycircuit.graph.grouping import join_alike, similarities
from pycircuit.graph.layer_order import GroupOrder
from pycircuit.graph.supernodes import supernodes

pytestmark = pytest.mark.usefixtures("one_thread")


def quotient(graph: Graph, groups: list[tuple[int, ...]], pruned) -> networkx.DiGraph:
    """The graph of groups and single nodes, without edges inside a group."""
    owner = {node: ("group", i) for i, nodes in enumerate(groups) for node in nodes}
    out = networkx.DiGraph()
    row = np.repeat(np.arange(graph.rows.count), graph.rows.lengths())
    for entry in pruned.edge_mask.nonzero()[:, 0].tolist():
        source, target = int(graph.rows.column[entry]), int(graph.row_node[row[entry]])
        a, b = owner.get(source, source), owner.get(target, target)
        if a != b:
            out.add_edge(a, b)
    return out


@pytest.mark.parametrize("seed", range(6))
def test_the_graph_of_groups_has_no_cycle(seed: int) -> None:
    graph = random_graph(60, layers=5, positions=3, density=0.25, seed=seed)
    pruned = graph.prune(0.95, 0.9)
    groups = [group.nodes for group in supernodes(pruned, "structure")]
    assert groups
    assert networkx.is_directed_acyclic_graph(quotient(graph, groups, pruned))
    members = [node for nodes in groups for node in nodes]
    assert len(members) == len(set(members)) and all(len(nodes) > 1 for nodes in groups)
    assert all(pruned.node_mask[node] and node < graph.first_error for node in members)


def test_joins_that_would_close_a_cycle_are_refused() -> None:
    """Joined by any similarity, the groups of these graphs have cycles; in their order, none has."""
    cycles = 0
    for seed in range(6):
        pruned = (graph := random_graph(60, layers=5, positions=3, density=0.25, seed=seed)).prune(0.95, 0.9)
        free = pruned.node_mask[: graph.first_error].nonzero()[:, 0].numpy()
        draws = np.random.default_rng(seed).random((len(free), len(free))).astype(np.float32)
        similarity = (draws + draws.T) / 2

        class Free(GroupOrder):
            def may_join(self, a: int, b: int) -> bool:
                return True

        for order, is_free in ((Free(pruned, free, []), True), (GroupOrder(pruned, free, []), False)):
            group = join_alike(similarity, 0.5, order)
            groups = [tuple(free[group == g].tolist()) for g in np.unique(group)]
            acyclic = networkx.is_directed_acyclic_graph(quotient(graph, groups, pruned))
            cycles += is_free and not acyclic
            assert is_free or (acyclic and len(groups) < len(free))
    assert cycles


@pytest.mark.parametrize("seed", range(3))
def test_groups_join_as_scipy_joins_them(seed: int) -> None:
    """Average linkage, where no edge forbids anything."""
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    from scipy.spatial.distance import squareform

    points = np.random.default_rng(seed).normal(size=(40, 3))
    similarity = (1 / (1 + np.linalg.norm(points[:, None] - points, axis=2))).astype(np.float32)
    pruned = by_hand().prune(1, 1)
    order = GroupOrder(pruned, np.zeros(0, np.int64), [np.zeros(0, np.int64)] * 40)
    ours = join_alike(similarity, 0.4, order)
    distance = squareform(1 - similarity.astype(np.float64), checks=False)
    theirs = hierarchy.fcluster(hierarchy.linkage(distance, "average"), 0.6, "distance")
    assert 3 < len(set(ours)) < 30
    assert np.array_equal(ours[:, None] == ours, theirs[:, None] == theirs)


def blocks() -> Graph:
    """Two groups of features: those of one read one token and write one target, those of the other the others."""
    from graphs import assemble

    features = [[0, 0, f] for f in range(4)] + [[0, 1, f] for f in range(3)]
    count, layers, positions = len(features), 1, 2
    first_token = count + layers * positions
    matrix = torch.zeros(first_token + positions + 2, first_token + positions + 2, dtype=torch.float64)
    for node, (_, position, feature) in enumerate(features):
        matrix[node, first_token + position] = 1 + feature
        matrix[first_token + positions + position, node] = 2 - 0.1 * feature
    return assemble(matrix, features, layers, positions, [0.5, 0.5])


def test_features_that_read_and_write_alike_are_a_group() -> None:
    groups = blocks().supernodes(1, 1)
    assert sorted(group.nodes for group in groups) == [(0, 1, 2, 3), (4, 5, 6)]
    assert {group.name for group in groups} == {"reads w0", "reads w1"}
    again = blocks().supernodes(1, 1, method="structure")
    assert again == groups
    labels = {(0, 0): "first", (0, 1): "second"}
    named = replace(blocks(), labels=labels).supernodes(1, 1, method="structure")
    assert sorted(group.nodes for group in named) == [(0, 1, 2, 3), (4, 5, 6)]  # labels name, and decide nothing
    assert {group.name.split(" at ")[0] for group in named} <= {"first", "second"}
    assert len({group.name for group in named}) == 2


def test_decoders_tell_features_apart() -> None:
    """Features of one row and column, whose decoders point in two directions."""
    decoders = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0], [0, 1], [0, 1], [0, 1]])
    groups = blocks().supernodes(1, 1, method="structure", decoders=decoders)
    assert (4, 5, 6) in [group.nodes for group in groups]
    similarity = similarities(blocks().prune(1, 1), np.arange(4), decoders[:4].numpy())
    assert similarity[0, 1] == pytest.approx(1, abs=1e-4) and similarity[0, 2] == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize("method", ["structure", "label"])
def test_fixed_groups_stay(method: str) -> None:
    graph = random_graph(60, layers=5, positions=3, density=0.25, seed=3)
    fixed = {"by hand": [40, 2, 11], "one": [7], "ends": [graph.first_target, graph.first_token]}
    pruned = graph.prune(0.95, 0.9)
    groups = supernodes(pruned, method, fixed)  # type: ignore[arg-type]
    by_name = {group.name: group.nodes for group in groups}
    assert {name: by_name[name] for name in fixed} == {name: tuple(sorted(nodes)) for name, nodes in fixed.items()}
    members = [node for group in groups for node in group.nodes]
    assert len(members) == len(set(members))
    if method == "structure":
        hand = quotient(graph, [tuple(nodes) for nodes in fixed.values()], pruned)
        cycles = [len(c) for c in networkx.strongly_connected_components(hand) if len(c) > 1]
        mixed = quotient(graph, [group.nodes for group in groups], pruned)
        assert len([c for c in networkx.strongly_connected_components(mixed) if len(c) > 1]) <= len(cycles)


def test_arguments_of_supernodes() -> None:
    graph = random_graph()
    with pytest.raises(ValueError, match=r"^Graph.supernodes: method must be one of structure, label, got 'best'"):
        graph.supernodes(method="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^Graph.supernodes: fixed must name a node once, got 1 in 'a' and 'b'"):
        graph.supernodes(fixed={"a": [0, 1], "b": [1]})
    with pytest.raises(ValueError, match=r"^Graph.supernodes: fixed\['a'\] must be below"):
        graph.supernodes(fixed={"a": [10**6]})
    with pytest.raises(ValueError, match=r"^Graph.supernodes: fixed\['a'\] must have a node, got none"):
        graph.supernodes(fixed={"a": []})
    with pytest.raises(TypeError, match=r"^Graph.supernodes: fixed must be a dict from name to nodes, got list"):
        graph.supernodes(fixed=[[1]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^Graph.supernodes: decoders must have a row for each of"):
        graph.supernodes(method="structure", decoders=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^Graph.supernodes: decoders must be None with method='label'"):
        graph.supernodes(method="label", decoders=torch.ones(graph.first_error, 3))


def scores_by_inverse(graph: Graph, nodes: list[int]) -> tuple[float, float]:
    """Dense and in float64: the rows of other features are zero, and they count as errors."""
    matrix = normalised(graph.dense())
    other = torch.ones(graph.first_error, dtype=torch.bool)
    other[[node for node in nodes if node < graph.first_error]] = False
    matrix[: graph.first_error][other] = 0
    weights, eye = weights_of(graph), torch.eye(graph.nodes, dtype=torch.float64)
    reached = weights @ torch.linalg.inv(eye - matrix)
    tokens = reached[graph.first_token : graph.first_target].sum()
    errors = reached[graph.first_error : graph.first_token].sum() + reached[: graph.first_error][other].sum()
    return float(tokens / (tokens + errors)), float(1 - errors / reached.sum())


@pytest.mark.parametrize("seed", range(4))
def test_scores_of_a_selection(seed: int) -> None:
    graph = random_graph(40, layers=4, seed=seed)
    for share in (0.0, 0.3, 0.7):
        nodes = [n for n in range(graph.nodes) if torch.rand(1).item() < share]
        assert graph.subgraph_scores(nodes) == pytest.approx(scores_by_inverse(graph, nodes), abs=1e-12)
    assert (
        graph.subgraph_scores(range(graph.first_error)) == graph.scores() == graph.subgraph_scores(range(graph.nodes))
    )
    nothing = graph.subgraph_scores([])
    matrix = normalised(graph.dense())[graph.first_target :]
    direct = (weights_of(graph)[graph.first_target :] @ matrix)[graph.first_token : graph.first_target].sum()
    share = direct / graph.targets.weights.sum()
    assert nothing.replacement == pytest.approx(float(share), abs=1e-12)
    assert graph.subgraph_scores([graph.first_token, graph.first_error]) == nothing  # a token, an error
    with pytest.raises(ValueError, match=r"^Graph.subgraph_scores: nodes must be below"):
        graph.subgraph_scores([graph.nodes])


def test_stability_counts_prunings() -> None:
    graph = random_graph(60, layers=5, targets=3, seed=1)
    node_thresholds, edge_thresholds = (0.5, 0.8, 0.9), (0.9, 0.98)
    thresholds = [(n, e) for n in node_thresholds for e in edge_thresholds]
    fixed = graph.stability(node_thresholds, edge_thresholds, samples=1, progress=False)
    prunings = [graph.prune(*pair) for pair in thresholds]
    assert torch.equal(fixed.nodes, torch.stack([p.node_mask.double() for p in prunings]).sum(0) / len(prunings))
    assert torch.equal(fixed.edges, torch.stack([p.edge_mask.double() for p in prunings]).sum(0) / len(prunings))
    steps: list[tuple[str, int, int]] = []
    sampled = graph.stability(node_thresholds, edge_thresholds, samples=3, progress=lambda *step: steps.append(step))
    assert sampled.prunings == 18 and steps[-1] == ("pruning", 18, 18)
    assert not torch.equal(sampled.nodes, fixed.nodes)  # reweighted targets change what is kept
    again = graph.stability(node_thresholds, edge_thresholds, samples=3, progress=False)
    assert torch.equal(again.nodes, sampled.nodes) and torch.equal(again.edges, sampled.edges)
    other = graph.stability(node_thresholds, edge_thresholds, samples=3, seed=1, progress=False)
    assert not torch.equal(other.edges, sampled.edges)
    core, contingent = sampled.core, sampled.contingent
    assert not (core.node_mask & contingent.node_mask).any() and not (core.edge_mask & contingent.edge_mask).any()
    assert core.node_mask[graph.first_token :].all() and core.graph.certificate < 1e-12
    assert torch.equal(core.node_mask | contingent.node_mask, sampled.nodes > 0)
    assert "18" in repr(sampled) and "core" in repr(sampled)
    with pytest.raises(ValueError, match=r"^Graph.stability: core must be above 0 and at most 1, got 0"):
        graph.stability(core=0)
    with pytest.raises(ValueError, match=r"^Graph.stability: node_threshold must be from 0 to 1, got 2"):
        graph.stability([2])


def test_a_large_graph_is_grouped() -> None:
    graph = cone_graph(6, 16, 6, 400)
    groups = graph.supernodes(0.95, 0.9)
    assert len(groups) > 2 and groups == graph.supernodes(0.95, 0.9)
