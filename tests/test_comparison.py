"""Comparison of two graphs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import runner
from graphs import assemble, random_graph

import pycircuit as pc
from pycircuit.graph import Graph, Tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def pair() -> tuple[Graph, Graph]:
    """Two graphs of one layer and two positions: feature 5 at both positions in the first, 5 and 6 in the second."""
    graphs = []
    for features, weights in (([[0, 0, 5], [0, 1, 5]], [2.0, 1.0]), ([[0, 0, 5], [0, 1, 6]], [3.0, 4.0])):
        matrix = torch.zeros(7, 7, dtype=torch.float64)  # 2 features, 2 errors, 2 tokens, a target
        for node, weight in enumerate(weights):
            matrix[6, node] = weight
            matrix[node, 4 + node] = 1
        graphs.append(assemble(matrix, features, 1, 2, [1.0]))
    second = graphs[1]
    tokens = Tokens(second.tokens.ids, [" w0", " other"])
    return graphs[0], replace(second, tokens=tokens, labels={(0, 6): "six"})


def test_by_feature_and_position() -> None:
    result = pc.compare(*pair(), node_threshold=1, edge_threshold=1)
    assert {n.name for n in result.only_a} == {"0/1/5", "w1 token/1"}
    assert {n.name for n in result.only_b} == {"six 0/1/6", "other token/1"}
    both = {n.name: n for n in result.both}
    assert set(both) == {"0/0/5", "w0 token/0", "t0 target"}
    node = both["0/0/5"]
    assert node.a == node.b == (0,)
    assert (node.influence_a, node.influence_b) == (pytest.approx(2 / 3), pytest.approx(3 / 7))
    assert node.change == pytest.approx(3 / 7 - 2 / 3)
    edges = {(e.source, e.target): (e.weight_a, e.weight_b) for e in result.edges}
    assert edges == {("0/0/5", "t0 target"): (2, 3), ("w0 token/0", "0/0/5"): (1, 1)}
    only_a = {(e.source, e.target): (e.weight_a, e.weight_b) for e in result.edges_only_a}
    assert only_a == {("0/1/5", "t0 target"): (1, 0), ("w1 token/1", "0/1/5"): (1, 0)}
    assert result.edges_only_b[0].change == 4


def test_by_feature_alone() -> None:
    result = pc.compare(*pair(), align="feature", node_threshold=1, edge_threshold=1)
    both = {n.name: n for n in result.both}
    assert both["0/*/5"].a == (0, 1) and both["0/*/5"].b == (0,)
    assert both["0/*/5"].influence_a == pytest.approx(1)
    assert {n.name for n in result.only_b} == {"six 0/*/6", "other token"}
    edges = {(e.source, e.target): (e.weight_a, e.weight_b) for e in result.edges}
    assert edges["0/*/5", "t0 target"] == (3, 3)  # sums over positions


def test_by_label_across_models() -> None:
    """Features of one label are one, named by hand or automatically; those without a label are themselves."""
    a, b = pair()
    a = replace(a, labels={(0, 5): "six"}, provenance={"model": "one"})
    b = replace(b, provenance={"model": "another"})
    result = pc.compare(a, b, align="label", node_threshold=1, edge_threshold=1)
    both = {n.name: n for n in result.both}
    assert both["six at 1"].a == (1,) and both["six at 1"].b == (1,)
    assert {n.name for n in result.only_a} == {"six at 0", "w1 token/1"}
    assert {n.name for n in result.only_b} == {"0/0/5", "other token/1"}
    edges = {(e.source, e.target): (e.weight_a, e.weight_b) for e in result.edges}
    assert edges["six at 1", "t0 target"] == (1, 4)
    automatic = replace(b, labels={}, automatic_labels={(0, 6): "six"})
    assert "six at 1" in {n.name for n in pc.compare(a, automatic, align="label", node_threshold=1).both}
    for align in ("position", "feature"):
        with pytest.raises(ValueError, match=rf"^compare: a and b .*align='{align}', got model one and another; use"):
            pc.compare(a, b, align=align)


@pytest.mark.parametrize("align", ["position", "feature"])
def test_weights_and_influence_are_sums_over_the_whole_graphs(align: pc.graph.comparison.Alignment) -> None:
    a, b = random_graph(40, seed=1), random_graph(40, seed=2)
    result = pc.compare(a, b, align=align)
    dense = [graph.dense().double() for graph in (a, b)]
    influence = [graph.influence() / graph.targets.weights.sum() for graph in (a, b)]
    nodes = {n.name: n for n in [*result.only_a, *result.only_b, *result.both]}
    assert len(nodes) == len(result.only_a) + len(result.only_b) + len(result.both)
    for node in nodes.values():
        assert node.influence_a == pytest.approx(float(influence[0][list(node.a)].sum()))
        assert node.influence_b == pytest.approx(float(influence[1][list(node.b)].sum()))
    count = 0
    for edge in result.edges:
        if edge.source in nodes and edge.target in nodes:
            source, target = nodes[edge.source], nodes[edge.target]
            sums = [
                float(m[list(t)][:, list(s)].sum()) for m, s, t in zip(dense, source[2:4], target[2:4], strict=True)
            ]
            assert (edge.weight_a, edge.weight_b) == (pytest.approx(sums[0]), pytest.approx(sums[1]))
            count += 1
    assert count > 5


def test_a_graph_and_itself_do_not_differ() -> None:
    graph = random_graph(40, seed=1)
    result = pc.compare(graph, graph)
    assert not (result.only_a or result.only_b or result.edges_only_a or result.edges_only_b)
    assert all(entry.change == 0 for entry in [*result.both, *result.edges]) and result.similarity == 1
    assert pc.compare(graph, random_graph(40, seed=2)).similarity < 0.9


def test_it_is_shown() -> None:
    a, b = pair()
    result = pc.compare(a, replace(b, labels={(0, 6): "<six>"}))
    assert "only in B: " in repr(result) and "<six> 0/1/6" in repr(result)
    page = result._repr_html_()
    assert "&lt;six&gt; 0/1/6" in page and "<six>" not in page


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = runner(monkeypatch, capsys)
    a, b = pair()
    a.save(tmp_path / "a.safetensors")
    b.save(tmp_path / "b.safetensors")
    files = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    printed = json.loads(run("compare", *files, "--json", "--align", "feature").out)
    assert printed["both"] and printed["counts"]["both"] == len(printed["both"])
    assert printed == json.loads(json.dumps(pc.compare(a, b, align="feature").as_dict()))
    assert "only in B" in run("compare", *files).out
    with pytest.raises(TypeError, match=r"^compare: b must be a pc.Graph, got str"):
        pc.compare(a, "b")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^compare: align must be one of position, feature, label, got 'both'"):
        pc.compare(a, b, align="both")  # type: ignore[arg-type]
