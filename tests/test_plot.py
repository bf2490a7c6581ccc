"""Labels, supernodes, the tree and the picture of a graph."""

from __future__ import annotations

import itertools
import json
import re
import time
import xml.etree.ElementTree as Xml
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graphs import assemble, cone_graph, labelled_graph, random_graph

from pycircuit.graph import Graph, Tokens
from pycircuit.graph.paths import strongest_path
from pycircuit.graph.show.layout import WIDEST, Box, lay_out, measure, route, shorten
from pycircuit.graph.show.tree import lines

pytestmark = pytest.mark.usefixtures("one_thread")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_kept(tmp_path: Path, seed: int) -> None:
    graph = labelled_graph(seed)
    graph.save(tmp_path / "g.safetensors")
    assert Graph.load(tmp_path / "g.safetensors").labels == graph.labels
    assert graph.prune().graph.labels == graph.labels
    layer, position, feature = next(f for f in graph.features.tolist() if (f[0], f[2]) in graph.labels)
    assert graph.describe(graph.feature_node(layer, position, feature))["label"] == graph.labels[layer, feature]


@pytest.mark.parametrize("labels", [[], {(0, 1, 2): "x"}, {(0, "1"): "x"}, {(0, 1): 3}])
def test_wrong_labels(labels) -> None:
    with pytest.raises(TypeError, match=r"Graph: labels"):
        replace(random_graph(), labels=labels)


def test_supernodes() -> None:
    graph = labelled_graph(count=60)
    groups = graph.supernodes(1, 1, method="label")
    members = [node for group in groups for node in group.nodes]
    assert groups and len(members) == len(set(members))
    for label, nodes in groups:
        features = graph.features[list(nodes)].tolist()
        if label in graph.labels.values():
            assert {graph.labels[layer, f] for layer, _, f in features} == {label}
            assert len({position for _, position, _ in features}) == 1
        else:
            assert len({(layer, f) for layer, _, f in features}) == 1
    mass = graph.influence()
    sums = [float(mass[list(nodes)].sum()) for _, nodes in groups]
    assert sums == sorted(sums, reverse=True)


def test_json_has_labels_and_supernodes(tmp_path: Path) -> None:
    graph = labelled_graph(count=60)
    result = graph.supernodes(1, 1, method="label")
    graph.to_json(tmp_path / "g.json", node_threshold=1, edge_threshold=1, groups=result)
    written = json.loads((tmp_path / "g.json").read_text())
    nodes = {node["node_id"]: node for node in written["nodes"]}
    groups = written["qParams"]["supernodes"]
    assert [len(ids) for _, *ids in groups] == [len(g.nodes) for g in result]
    named = 0
    for (group, *ids), (label, _) in zip(groups, result, strict=True):
        assert re.fullmatch(rf"{re.escape(label)}( \(\d+\))?", group)
        clerps = {nodes[i]["clerp"] for i in ids}
        assert clerps == ({label} if label in graph.labels.values() else {""})
        named += label in graph.labels.values()
    assert 0 < named < len(groups)


BLANK = ("", " ", "\n\n", "\t", "\x00\x1b[31m", "\ud800", "\ufffe", "\u202e", "\u0301", "<&]]>", "x" * 5000)


@pytest.mark.parametrize("text", BLANK, ids=lambda text: ascii(text[:9]))
def test_texts_that_are_empty_or_cannot_be_printed(text: str, tmp_path: Path) -> None:
    """Such tokens, targets, labels and prompts give a valid picture, a tree of short lines, and JSON."""
    base = random_graph(count=40)
    labels = {(layer, feature): text for layer, _, feature in base.features.tolist()}
    targets = replace(base.targets, labels=[text] * len(base.targets))
    tokens = Tokens(base.tokens.ids, [text] * base.positions)
    graph = replace(base, tokens=tokens, targets=targets, labels=labels, prompt=text)
    for group in (True, False):
        graph.plot(tmp_path / "g.svg", 1, 1, group=group)
        drawing = Xml.parse(tmp_path / "g.svg").getroot()
        assert all(t.text for t in drawing.iter(f"{SVG}text"))
    assert all(len(line.text) < 110 and line.text.isprintable() for line in lines(graph, 1, 9, 3, 0.0)[1:])
    graph.to_json(tmp_path / "g.json")
    assert json.loads((tmp_path / "g.json").read_text())["metadata"]["prompt_tokens"] == tokens.text


def test_features_with_an_empty_label_are_no_group() -> None:
    graph = labelled_graph(count=60)
    unnamed = replace(graph, labels=dict.fromkeys(graph.labels, ""))
    assert unnamed.supernodes(1, 1) == replace(graph, labels={}).supernodes(1, 1)


def floats(element: Xml.Element, *names: str) -> tuple[float, ...]:
    return tuple(float(element.get(name, "nan")) for name in names)


def boxes(path: Path) -> tuple[list[tuple[float, ...]], tuple[float, ...], Xml.Element]:
    root = Xml.fromstring(path.read_text(encoding="utf-8"))
    rects = [r for group in root.iter(f"{SVG}g") for r in group.iter(f"{SVG}rect")]
    return [floats(r, "x", "y", "width", "height") for r in rects], floats(root, "width", "height"), root


def spans(root: Xml.Element) -> list[tuple[float, float, float, float]]:
    """(left, right, top, bottom) of every text."""
    out = []
    for text in root.iter(f"{SVG}text"):
        x, y, size = floats(text, "x", "y", "font-size")
        wide = measure(text.text or "", size)
        left = x - wide / 2 if text.get("text-anchor") == "middle" else x
        out.append((left, left + wide, y - 0.8 * size, y + 0.25 * size))
    return out


def on_path(root: Xml.Element) -> list[Xml.Element]:
    """The curves of the strongest path."""
    return [p for p in root.iter(f"{SVG}path") if "pc-path" in p.get("class", "")]


def check(graph: Graph, out: Path) -> Xml.Element:
    """Nothing overlaps, nothing stands outside, the strongest path is drawn."""
    shapes, (width, height), root = boxes(out)
    for x, y, w, h in shapes:
        assert x >= 0 and x + w <= width and y >= 0 and y + h <= height
    for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(shapes, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay, "boxes overlap"
    texts = spans(root)
    assert all(a >= 0 and b <= width and c >= 0 and d <= height for a, b, c, d in texts)
    for item, two in itertools.combinations(texts, 2):
        assert item[1] <= two[0] or two[1] <= item[0] or item[3] <= two[2] or two[3] <= item[2], "texts overlap"
    path = strongest_path(graph)
    marked = on_path(root)
    assert 0 < len(marked) <= len(path.nodes) - 1 if path else not marked
    assert width <= WIDEST + 1
    return root


@pytest.mark.parametrize(("count", "positions", "seed"), [(30, 3, 0), (120, 6, 1), (0, 2, 2), (200, 60, 3), (5, 1, 4)])
@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (1, 1)])
def test_plot(tmp_path: Path, count: int, positions: int, seed: int, thresholds: tuple[float, float]) -> None:
    graph = labelled_graph(seed, count=count, positions=positions)
    for group in (True, False):
        graph.plot(tmp_path / "g.svg", *thresholds, group=group)
        check(graph, tmp_path / "g.svg")
        graph.plot(tmp_path / "again.svg", *thresholds, group=group)
        assert (tmp_path / "g.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_plot_draws_the_path_of_paths(tmp_path: Path) -> None:
    graph = random_graph(count=40)
    graph.plot(tmp_path / "g.svg", group=False)
    _, _, root = boxes(tmp_path / "g.svg")
    titles = [p.find(f"{SVG}title") for p in on_path(root)]
    path = strongest_path(graph)
    assert path is not None and len(titles) == len(path.nodes) - 1
    texts = " ".join(title.text or "" for title in titles if title is not None)
    assert all(f": {weight:+.3g}," in texts for weight in path.weights)


def test_plot_sums_groups(tmp_path: Path) -> None:
    """Two features of one label feed the target by 3 and -1, and take 2 and 4 from the token: one box, +2 and +6."""
    matrix = torch.zeros(5, 5, dtype=torch.float64)
    matrix[4, 0], matrix[4, 1], matrix[0, 3], matrix[1, 3] = 3, -1, 2, 4
    graph = replace(assemble(matrix, [[0, 0, 1], [0, 0, 2]], 1, 1, [0.5]), labels={(0, 1): "one", (0, 2): "one"})
    texts = {}
    for group in (True, False):
        graph.plot(tmp_path / "g.svg", 1, 1, group=group)
        root = check(graph, tmp_path / "g.svg")
        texts[group] = [t.text or "" for p in root.iter(f"{SVG}path") for t in p.iter(f"{SVG}title")]
    assert sorted(texts[True]) == [
        "one ×2 to t0 50%: +2, 100% of what is drawn", "w0 to one ×2: +6, 100% of what is drawn",
    ]  # fmt: skip
    assert len(texts[False]) == 4 and any(": -1, 25%" in text for text in texts[False])


def test_curves_end_at_their_boxes() -> None:
    """Below, beside and above what they feed: each curve leaves and enters at an edge of its box, none runs through."""

    def box(node: int, row: int, *sources: int) -> Box:
        return Box([node], "feature", f"f{node}", "", row, 0, 1.0 / (1 + node), dict.fromkeys(sources, 1.0))

    boxes = [box(0, 1, 1, 2, 3), box(1, 0), box(2, 1), box(3, 2)]
    layout = lay_out(boxes)
    for source, target, ((x0, y0), _, _, (x1, y1)) in route(boxes, layout.width):
        a, b = boxes[source], boxes[target]
        assert a.x < x0 < a.x + a.width and b.x < x1 < b.x + b.width
        expected = {1: (a.y, b.y + b.height), 2: (a.y, b.y), 3: (a.y + a.height, b.y)}[source]
        assert (y0, y1) == expected


def test_plot_of_only_errors(tmp_path: Path) -> None:
    matrix = torch.zeros(7, 7)
    matrix[6, 0], matrix[6, 1] = 1, -2
    graph = assemble(matrix, [], 2, 2, [0.5])
    counts = []
    for errors in (False, True):
        graph.plot(tmp_path / "g.svg", 1, 1, errors=errors)
        root = check(graph, tmp_path / "g.svg")
        counts.append([t.text for t in root.iter(f"{SVG}text")].count("errors"))
    assert counts == [0, 3]  # one in each column, and the row's name


def test_plot_merges_errors_by_column(tmp_path: Path) -> None:
    """Three errors of one column are a box, with the sum of their edges and the names of all."""
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    matrix[7, [3, 4, 5]] = torch.tensor([3.0, -1, 2], dtype=torch.float64)
    matrix[7, 0], matrix[0, 6] = 1, 1
    graph = assemble(matrix, [[0, 0, 1], [0, 0, 2], [0, 0, 3]], 3, 1, [0.5])
    root = check(graph, graph.plot(tmp_path / "g.svg", 1, 1, errors=True) and tmp_path / "g.svg")
    titles = [t.text or "" for t in root.iter(f"{SVG}title")]
    assert "errors ×3 to t0 50%: +4, 80% of what is drawn" in titles
    assert any(text.startswith("error/0/0 @w0\nerror/1/0 @w0\nerror/2/0 @w0\n") for text in titles)


def test_plot_draws_all_of_a_path(tmp_path: Path) -> None:
    """A chain of five features, and room for one."""
    matrix = torch.zeros(12, 12, dtype=torch.float64)
    for index in range(1, 5):
        matrix[index, index - 1] = 1
    matrix[0, 10] = matrix[11, 4] = 1
    graph = assemble(matrix, [[layer, 0, layer] for layer in range(5)], 5, 1, [0.5])
    graph.plot(tmp_path / "g.svg", max_nodes=1)
    root = check(graph, tmp_path / "g.svg")
    assert len(on_path(root)) == 6


def test_plot_leaves_out_and_says_so(tmp_path: Path) -> None:
    graph = random_graph(count=60)
    graph.plot(tmp_path / "g.svg", 1, 1, max_nodes=4)
    root = check(graph, tmp_path / "g.svg")
    inner = int(graph.prune(1, 1).node_mask[: graph.first_error].sum())
    drawn = len(boxes(tmp_path / "g.svg")[0]) - graph.positions - len(graph.targets)
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert 0 < drawn <= 4 and f"{inner - drawn} weaker boxes not drawn" in texts


def test_plot_of_odd_text(tmp_path: Path) -> None:
    graph = labelled_graph(count=40)
    odd = Tokens(graph.tokens.ids, ["<bos>", ' "a&b"\n', "\x00\x1b\ud800\uffff"])
    graph = replace(graph, tokens=odd)
    graph.plot(tmp_path / "g.svg", max_nodes=5)
    texts = [t.text for t in check(graph, tmp_path / "g.svg").iter(f"{SVG}text")]
    assert "<bos>" in texts and '"a&b"·' in texts and "····" in texts


def test_long_texts_are_shortened() -> None:
    assert shorten("short", 12, 100) == "short" and shorten("", 12, 0) == ""
    for text in ("a name that is far too long", "漢字" * 20, "W" * 50):
        result = shorten(text, 12, 100)
        assert result.endswith("…") and measure(result, 12) <= 100 and text.startswith(result[:-1])
        assert measure(result[:-1] + text[len(result) - 1 : len(result) + 1] + "…", 12) > 100


def test_plot_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="plot: path must be in a folder that exists"):
        random_graph().plot(tmp_path / "absent" / "g.svg")
    with pytest.raises(ValueError, match="plot: max_nodes must be"):
        random_graph().plot(tmp_path / "g.svg", max_nodes=0)
    for argument in ("group", "errors"):
        with pytest.raises(TypeError, match=f"plot: {argument} must be True.*, got str"):
            random_graph().plot(tmp_path / "g.svg", **{argument: "yes"})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def long_graph() -> Graph:
    """26 layers, 512 tokens, 40,000 features, some of which are fed by others, and wide labels."""
    graph = cone_graph(26, 512, 3, 120, targets=2)
    return replace(graph, labels={(layer, 0): f"a label of {layer} that is rather long" for layer in range(26)})


def test_picture_of_a_long_prompt(long_graph: Graph, tmp_path: Path) -> None:
    """As narrow as any, with the columns of its boxes alone and a mark for the others, in less than two seconds."""
    start = time.process_time()
    picture = long_graph.plot(tmp_path / "g.svg", max_nodes=60)
    assert time.process_time() - start < 2
    root = check(long_graph, tmp_path / "g.svg")
    texts = [t.text or "" for t in root.iter(f"{SVG}text")]
    titles = [t.text or "" for t in root.iter(f"{SVG}title")]
    tokens = [int(text[1:]) for text in texts if re.fullmatch(r"w\d+", text)]
    assert 2 < len(tokens) <= 20 and 511 in tokens and tokens == sorted(tokens)
    absent = [re.match(r"tokens (\d+) to (\d+) are not drawn: w\1 ", title + " ") for title in titles]
    gaps = [(int(m[1]), int(m[2])) for m in absent if m]
    covered = [p for a, b in gaps for p in range(a, b + 1)]
    assert sorted([*covered, *tokens]) == list(range(512)) and texts.count("⋯") == len(gaps)
    assert picture.svg == (tmp_path / "g.svg").read_text(encoding="utf-8")


def test_plot_returns_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a path nothing is written; a notebook finds the picture, which `save` writes."""
    monkeypatch.chdir(tmp_path)
    picture = random_graph().plot()
    assert not list(tmp_path.iterdir()) and picture._repr_svg_() == picture.svg
    assert Xml.fromstring(picture.svg).tag == f"{SVG}svg" and len(repr(picture)) < 100
    picture.save("g.svg")
    assert (tmp_path / "g.svg").read_text(encoding="utf-8") == random_graph().plot().svg
    with pytest.raises(ValueError, match=r"Picture.save: path must end in .svg, got g.png"):
        picture.save("g.png")


def test_signs_are_told_apart_without_colour(tmp_path: Path) -> None:
    graph = random_graph(count=40)
    _, _, root = boxes(graph.plot(tmp_path / "g.svg", group=False) and tmp_path / "g.svg")
    edges = [p for p in root.iter(f"{SVG}path") if p.get("class", "").startswith(("pc-up", "pc-down"))]
    for edge in edges:
        lowers = ": -" in (edge.findtext(f"{SVG}title") or "")
        assert lowers == edge.get("class", "").startswith("pc-down") == (edge.get("stroke-dasharray") is not None)
    assert len({edge.get("stroke") for edge in edges}) == 2


def test_an_automatic_label_is_italic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = Graph.describe
    graph = random_graph(count=40)
    italic = Xml.fromstring(graph.plot().svg)
    assert not [t for t in italic.iter(f"{SVG}text") if t.get("font-style")]
    monkeypatch.setattr(
        Graph, "describe",
        lambda g, n: describe(g, n) | ({"label": "Vienna", "automatic": True} if n < g.first_error else {}),
    )  # fmt: skip
    root = Xml.fromstring(graph.plot().svg)
    texts = [t for t in root.iter(f"{SVG}text") if t.text == "Vienna"]
    assert texts and all(t.get("font-style") == "italic" for t in texts)
    assert "italic: automatic label" in [t.text for t in root.iter(f"{SVG}text")]


def test_a_box_has_few_edges(tmp_path: Path) -> None:
    """The strongest six into a box, none below a tenth of the first, and those of the path."""
    graph = random_graph(count=200, layers=6, positions=6)
    graph.plot(tmp_path / "g.svg", 1, 1, group=False)
    root = check(graph, tmp_path / "g.svg")
    into: dict[str, list[float]] = {}
    for path in root.iter(f"{SVG}path"):
        match = re.match(r"(.+) to (.+): ([-+]\S+), ", path.findtext(f"{SVG}title") or "")
        if match and "pc-path" not in path.get("class", ""):
            into.setdefault(match[2], []).append(abs(float(match[3])))
    sizes = [sorted(weights, reverse=True) for weights in into.values()]
    assert max(map(len, sizes)) == 6 and all(weights[-1] >= 0.099 * weights[0] for weights in sizes)
