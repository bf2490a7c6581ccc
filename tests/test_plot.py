"""Labels, supernodes, the tree and the picture of a graph."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as Xml
from dataclasses import replace
from pathlib import Path

import pytest
from graphs import assemble, random_graph

from pycircuit.graph import Graph, Tokens
from pycircuit.graph.tree import lines, strongest

SVG = "{http://www.w3.org/2000/svg}"


def labelled(seed: int = 0, **how) -> Graph:
    graph = random_graph(seed=seed, **how)
    names = ["Texas", 'say <Austin> & "more"', "a name that is far too long to be drawn in one box"]
    keys = sorted({(layer, feature) for layer, _, feature in graph.features.tolist()})
    return replace(graph, labels={key: names[i % 4] for i, key in enumerate(keys) if i % 4 < 3})


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_kept(tmp_path: Path, seed: int) -> None:
    graph = labelled(seed)
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
    graph = labelled(count=60)
    groups = graph.supernodes(1, 1)
    members = [node for group in groups for node in group.nodes]
    assert groups and len(members) == len(set(members))
    for name, nodes in groups:
        features = graph.features[list(nodes)].tolist()
        if name in graph.labels.values():
            assert {graph.labels[layer, f] for layer, _, f in features} == {name}
            assert len({position for _, position, _ in features}) == 1
        else:
            assert len({(layer, f) for layer, _, f in features}) == 1
    mass = graph.influence()
    sums = [float(mass[list(nodes)].sum()) for _, nodes in groups]
    assert sums == sorted(sums, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_tree_holds_the_strongest_path(seed: int) -> None:
    graph = labelled(seed)
    path = strongest(graph, 0)
    best = max(
        (p for at in range(1, graph.positions) for p in graph.paths(graph.token_node(at), graph.target_node(0))),
        key=lambda p: p.strength,
    )
    assert path is not None and path.strength == best.strength
    found = lines(graph, 0, 9, 2, 0.0)
    assert found[0].style == "target" and found[0].text.startswith("t0")
    marked = [line.text for line in found if line.style == "path"]
    assert len(marked) >= len(path.nodes) - 1 and all("◀" in text for text in marked)
    assert all(len(line.text) < 110 and line.text.isprintable() for line in found)


def test_tree_of_nothing() -> None:
    import torch

    empty = assemble(torch.zeros(3, 3), [], 1, 1, [0.5])
    assert empty.tree() == "t0  0.500"
    with pytest.raises(ValueError, match="target must be"):
        empty.tree(target=3)
    with pytest.raises(ValueError, match="depth must be"):
        empty.tree(depth=0)
    with pytest.raises(ValueError, match="least must be from 0 to 1"):
        empty.tree(least=2)


def boxes(path: Path) -> tuple[list[tuple[float, ...]], tuple[float, float], Xml.Element]:
    root = Xml.fromstring(path.read_text())
    rects = [r for group in root.iter(f"{SVG}g") for r in group.iter(f"{SVG}rect")]
    shapes = [tuple(float(r.get(k)) for k in ("x", "y", "width", "height")) for r in rects]
    return shapes, (float(root.get("width")), float(root.get("height"))), root


@pytest.mark.parametrize(("count", "positions", "seed"), [(30, 3, 0), (120, 6, 1), (0, 2, 2), (200, 60, 3), (5, 1, 4)])
def test_plot(tmp_path: Path, count: int, positions: int, seed: int) -> None:
    graph = labelled(seed, count=count, positions=positions)
    out = tmp_path / "g.svg"
    graph.plot(out)
    shapes, (width, height), root = boxes(out)
    assert len(shapes) >= positions
    for x, y, w, h in shapes:
        assert x >= 0 and x + w <= width and y >= 0 and y + h <= height
    for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(shapes, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay, "boxes overlap"
    path = strongest(graph, 0)
    orange = [p for p in root.iter(f"{SVG}path") if p.get("stroke") == "#e07b00"]
    assert path is None or 1 <= len(orange) <= len(path.nodes) - 1
    graph.plot(tmp_path / "again.svg")
    assert out.read_text() == (tmp_path / "again.svg").read_text()


def test_plot_of_odd_text(tmp_path: Path) -> None:
    graph = labelled(count=40)
    odd = Tokens(graph.tokens.ids, ["<bos>", ' "a&b"\n', "\x00\x1b"])
    replace(graph, tokens=odd).plot(tmp_path / "g.svg", max_nodes=5)
    root = Xml.parse(tmp_path / "g.svg").getroot()
    said = [t.text for t in root.iter(f"{SVG}text")]
    assert "<bos>" in said and '"a&b"·' in said and any("not drawn" in t for t in said)


def test_plot_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="plot: path must be in a folder that exists"):
        random_graph().plot(tmp_path / "absent" / "g.svg")
    with pytest.raises(ValueError, match="plot: max_nodes must be"):
        random_graph().plot(tmp_path / "g.svg", max_nodes=0)
