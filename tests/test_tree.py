"""The tree of a graph: its lines against the dense matrix."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
import torch
from graphs import assemble, by_hand, cone_graph, labelled_graph, random_graph

from pycircuit.graph import Graph
from pycircuit.graph.identifiers import identifier
from pycircuit.graph.paths import strongest_path
from pycircuit.graph.show.node_names import name, percent
from pycircuit.graph.show.tree import Line, lines
from pycircuit.graph.supernodes import Supernode

pytestmark = pytest.mark.usefixtures("one_thread")

FIGURES = re.compile(r"^[│ ]*[├└]─ +([-+]\S+) +(\S+)%  (.+)$")


def depth_of(text: str) -> int:
    return 1 + min(text.find(mark) for mark in "├└" if mark in text) // 3


def tree_of(result: list[Line]) -> list[str]:
    """Lines between the target's and the strongest path."""
    texts = [line.text for line in result[1:]]
    ends = [i for i, text in enumerate(texts) if text.startswith("strongest path")]
    return texts[: ends[0]] if ends else texts


def test_tree_by_hand() -> None:
    """Every figure of it."""
    assert by_hand().tree().split("\n") == [
        "t0  1.000",
        "├─       +3    60%  1/0/6 @w0  ◀",
        "│  └─       +2    50%  0/0/5 @w0  ◀",
        "│     └─       +4   100%  “w0” token/0  ◀",
        "├─       +1    20%  0/0/5 @w0 (above)",
        "└─       -1    20%  errors",
        "strongest path, at least 50% at every step",
        "                    “w0” token/0",
        "         +4   100%  0/0/5 @w0",
        "         +2    50%  1/0/6 @w0",
        "         +3    60%  t0",
    ]
    with_errors = by_hand().tree(errors=True).split("\n")
    assert "│  └─       +2    50%  errors" in with_errors and len(with_errors) == 12


@pytest.mark.parametrize("seed", range(4))
def test_the_strongest_inputs_are_shown(seed: int) -> None:
    """Every unfolded node has them, in order, with the edges' weights; errors are no more than one line."""
    graph = random_graph(count=60, seed=seed)
    dense = graph.dense()
    shown = {identifier(graph, node): node for node in range(graph.nodes)}
    result = tree_of(lines(graph, 0, 9, 3, 0.2, max_lines=1000))
    stack, inputs = [graph.target_node(0)], {}
    for text in result:
        match = FIGURES.match(text)
        assert match, text
        if match[3] == "errors":
            assert depth_of(text) == 1
            continue
        node = next(shown[word] for word in match[3].split() if word in shown)
        del stack[depth_of(text) :]
        inputs.setdefault(stack[-1], []).append(node)
        assert float(match[1]) == pytest.approx(float(dense[stack[-1], node]), rel=1e-2)
        stack.append(node)
    for node, got in inputs.items():
        size = dense[node].abs()
        size[graph.first_error : graph.first_token] = 0
        order = size.argsort(descending=True)[:3].tolist()
        assert got == [i for i in order if size[i] >= 0.2 * size.max()]
    assert len(inputs) > 5


def test_faint_inputs_are_shown_where_all_are_faint() -> None:
    """The threshold is relative to the strongest input: errors of 99% hide nothing."""
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    matrix[4, :4] = torch.tensor([0.006, -0.004, 0.99, 0.0003])
    matrix[[0, 1], 3] = 1
    graph = assemble(matrix, [[0, 0, 1], [0, 0, 2]], 1, 1, [0.5])
    result = graph.tree()
    assert "+0.006   0.6%  0/0/1 @w0" in result and "-0.004   0.4%  0/0/2 @w0" in result
    assert result.count("errors") == 1 and "99%  errors" in result
    assert "token/0" not in result.split("\n")[-1] and "+0.0003" not in result


def test_features_of_one_label_are_one_line() -> None:
    """Weights and shares are those of all; edges among them are none of their inputs."""
    matrix = torch.zeros(7, 7, dtype=torch.float64)
    matrix[6, [0, 1]] = torch.tensor([3.0, 1], dtype=torch.float64)
    matrix[0, 5], matrix[1, 5], matrix[1, 0], matrix[1, 2] = 2, 4, 9, -2
    graph = assemble(matrix, [[0, 0, 1], [1, 0, 2]], 3, 1, [0.5])
    graph = replace(graph, labels={(0, 1): "Texas", (1, 2): "Texas"})
    assert graph.tree().split("\n")[1:3] == [
        "└─       +4   100%  Texas ×2 0/0/1 +1 @w0  ◀", "   └─       +6    75%  “w0” token/0  ◀",
    ]  # fmt: skip
    assert "Texas 0/0/1 @w0" in graph.tree(group=False) and "Texas 1/0/2 @w0" in graph.tree(group=False)


def test_supernodes_of_a_caller_are_lines_and_boxes() -> None:
    graph = random_graph(count=60)
    dense = graph.dense()
    first = dense[graph.target_node(0), : graph.first_error].abs().argsort(descending=True)[:3].tolist()
    group = [Supernode("say a capital", tuple(first)), Supernode("by itself", (first[0] - 1 or 1,))]
    text = graph.tree(group=group[:1])
    weight = float(dense[graph.target_node(0), first].sum())
    line = next(line for line in text.split("\n") if f"say a capital ×3 {identifier(graph, min(first))} +2" in line)
    assert f"{weight:+.3g} " in line
    assert ">say a capital ×3<" in graph.plot(group=group[:1]).svg
    for wrong, message in (
        ([*group, Supernode("again", (first[1],))], f"group must hold a node once, got node {first[1]} more often"),
        ([Supernode("error", (graph.first_error,))], "group must hold features, nodes below"),
        ([Supernode("none", ())], "got a group without nodes"),
    ):
        with pytest.raises(ValueError, match=message):
            graph.tree(group=wrong)
        with pytest.raises(ValueError, match=message):
            graph.plot(group=wrong)
    with pytest.raises(TypeError, match="tree: group must be True, False or a list of supernodes, got list"):
        graph.tree(group=[("x", (1,))])  # type: ignore[list-item]


@pytest.mark.parametrize("seed", range(4))
def test_tree_unfolds_a_node_once(seed: int) -> None:
    """A line that refers to another has nothing below it, and the line it names is above or below, as it says."""
    graph = labelled_graph(seed, count=90)
    for group in (True, False):
        result = tree_of(lines(graph, 0, 9, 6, 0.0, group=group, max_lines=1000))
        names = [match[3].replace("  ◀", "") for text in result if (match := FIGURES.match(text))]
        depth = [*map(depth_of, result), 0]
        opened = {n: i for i, n in enumerate(names) if depth[i + 1] > depth[i]}
        assert len(opened) == sum(depth[i + 1] > depth[i] for i in range(len(names)))
        for i, text in enumerate(names):
            if text.endswith((" (above)", " (below)")):
                assert (opened[text[:-8]] < i) == text.endswith("(above)")
        assert group or (len(opened) > 5 and any(text.endswith((" (above)", " (below)")) for text in names))


@pytest.mark.parametrize("limit", [1, 2, 17, 40])
def test_tree_is_bounded(limit: int) -> None:
    graph = labelled_graph(count=60)
    result = lines(graph, 0, 9, 5, 0.0, errors=True, max_lines=limit)
    assert len(tree_of(result)) == limit - 1
    assert max(map(depth_of, tree_of(lines(graph, 0, 2, 5, 0.0)))) == 2


def test_the_strongest_path_is_marked() -> None:
    graph = random_graph(count=40)
    path = strongest_path(graph)
    assert path is not None
    result = lines(graph, 0, 9, 9, 0.0, max_lines=1000)
    marked = [line for line in result[1:] if line.text.endswith("◀")]
    assert len(marked) == len(path.nodes) - 1 and all(line.style == "path" for line in marked)
    end = next(i for i, line in enumerate(result) if line.text.startswith("strongest path"))
    assert [text.text.split("  ")[-1] for text in result[end + 1 :]] == [name(graph, [node]) for node in path.nodes]


def test_a_weak_path_is_not_shown() -> None:
    """One that carries a hundredth of the strongest input is no circuit."""
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[5, [0, 1]] = torch.tensor([1.0, 0.01], dtype=torch.float64)
    matrix[0, 3], matrix[1, 4] = 5, 1
    graph = assemble(matrix, [[0, 0, 1], [0, 0, 2]], 2, 1, [0.5])
    assert "strongest path" not in graph.tree() and "◀" not in graph.tree()


def test_automatic_labels_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    describe = Graph.describe
    monkeypatch.setattr(Graph, "describe", lambda graph, node: describe(graph, node) | {"automatic": True})
    graph = replace(by_hand(), labels={(0, 5): "Vienna, Berlin"})
    assert "~Vienna, Berlin 0/0/5 @w0" in graph.tree()


def test_percentages() -> None:
    shares = (1, 0.1149, 0.0996, 0.041, 0.00951, 0.0041, 0.000041, 1e-9, 0)
    assert [percent(s) for s in shares] == ["100%", "11%", "10%", "4.1%", "1.0%", "0.41%", "0.0041%", "0%", "0%"]


def test_tree_of_nothing() -> None:
    empty = assemble(torch.zeros(3, 3), [], 1, 1, [0.5])
    assert empty.tree() == "t0  0.500"
    for arguments, message in (
        ({"target": 3}, "target must be"),
        ({"depth": 0}, "depth must be"),
        ({"max_lines": 0}, "max_lines must be"),
        ({"least": 2}, "least must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            empty.tree(**arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tree: errors must be True or False, got int"):
        empty.tree(errors=1)  # type: ignore[arg-type]


def test_tree_of_a_long_prompt() -> None:
    """512 tokens, 26 layers, 40,000 features, millions of edges: one pass, not a search from every token."""
    graph = cone_graph(26, 512, 3, 120, targets=1)
    assert graph.rows.entries > 1_500_000
    start = time.process_time()
    graph.tree()
    assert time.process_time() - start < 1
