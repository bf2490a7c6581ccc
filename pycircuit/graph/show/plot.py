"""A graph as a picture: SVG, written by hand, so that no plotting library is asked for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from pycircuit.files.atomic import writable_svg, write_text
from pycircuit.graph.supernodes import key
from pycircuit.ops import checks

from .layout import LEFT, Box, Curve, Place, measure, place, route, shorten
from .tree import name, plain, strongest

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph
    from pycircuit.graph.prune import Pruned

_MOST = 150  # pixels of a label
_COLLAPSE = 24  # positions from which on tokens that feed nothing drawn are drawn together
_FILL = {"feature": "#e8f0fb", "error": "#f3f3f3", "token": "#fdf3dc", "target": "#e4f5e6"}
_LINE = {"feature": "#5b84c4", "error": "#a8a8a8", "token": "#c79a3a", "target": "#4c9a57"}
_UP, _DOWN, _PATH, _FAINT, _GREY = "#3d7bd9", "#d9534f", "#e07b00", "#f7f7f8", "#666"


def plot(
    graph: Graph,
    path: str | os.PathLike[str],
    node_threshold: float,
    edge_threshold: float,
    max_nodes: int,
    target: int,
    group: bool,
) -> None:
    where = writable_svg("plot", path)
    checks.whole("plot", "max_nodes", max_nodes, 1)
    if not isinstance(group, bool):
        raise TypeError(f"plot: group must be True or False, got {type(group).__name__}")
    graph.target_node(target)
    pruned = graph.prune(node_threshold, edge_threshold)
    best = strongest(graph, target)
    path_nodes = [] if best is None else list(best.nodes)
    boxes, inner = _boxes(pruned, max_nodes, set(path_nodes), group)
    _edges(pruned, boxes, path_nodes)
    boxes = _collapsed(graph, _connected(boxes, path_nodes))
    left_out = inner - sum(box.kind in ("feature", "error") for box in boxes)
    where_all = place(boxes, graph.layers)
    write_text("plot", where, _svg(boxes, path_nodes, where_all, left_out, graph.layers))


def _boxes(pruned: Pruned, most: int, path: set[int], together: bool) -> tuple[list[Box], int]:
    """Tokens and targets, all of the path, and of the others the most influential; how many others there are."""
    graph, influence = pruned.whole, pruned.influence
    groups: dict[object, list[int]] = {}
    for node in sorted({*pruned.node_mask.nonzero()[:, 0].tolist(), *path}):
        groups.setdefault(_group(graph, node) if together else node, []).append(node)
    inner = [g for g in groups.values() if g[0] < graph.first_token]
    inner.sort(key=lambda g: (-len(path & set(g)), -float(influence[g].sum())))
    ends = [g for g in groups.values() if g[0] >= graph.first_token]
    chosen = [*inner[: max(most, sum(not path.isdisjoint(g) for g in inner))], *ends]
    return [_box(graph, nodes, float(influence[nodes].sum())) for nodes in chosen], len(inner)


def _group(graph: Graph, node: int) -> object:
    """Features of one label at one place are one box."""
    if node >= graph.first_error:
        return node
    layer, _, feature = graph.features[node].tolist()
    return key(graph, node) if graph.labels.get((layer, feature)) else node


def _box(graph: Graph, nodes: list[int], influence: float) -> Box:
    about = [graph.describe(node) for node in nodes]
    first, kind = about[0], about[0]["kind"]
    row = {"token": -1, "target": graph.layers}.get(kind, min(a.get("layer", 0) for a in about))
    size, after = 12, f" ×{len(nodes)}" if len(nodes) > 1 else ""
    if kind == "target":
        text, after, influence = plain(first["label"]), f" {100 * first['weight']:.0f}%", first["weight"]
    elif kind == "error":
        text, size = "error", 10
    elif kind == "token":
        text = plain(first["label"])
    else:
        text = plain(first.get("label") or f"L{first['layer']}/{first['feature']}")
    text = shorten(text, size, _MOST) + after
    title = "\n".join(name(graph, node) for node in nodes)
    return Box(nodes, kind, text, f"{title}\ninfluence {influence:.3f}", row, first["position"], influence)


def _edges(pruned: Pruned, boxes: list[Box], path: Sequence[int]) -> None:
    """Weights from box to box: sums over the kept edges between their nodes, and the path's whatever was kept."""
    graph = pruned.whole
    box_of = {node: at for at, box in enumerate(boxes) for node in box.nodes}
    row = {node: r for r, node in enumerate(graph.row_node.tolist())}
    starts = graph.rows.row_ptr.tolist()
    links = set(itertools.pairwise(path))
    for node, at in box_of.items():
        if node not in row:
            continue
        columns, weights = graph.rows.row(row[node])
        kept = pruned.edge_mask[starts[row[node]] : starts[row[node] + 1]]
        for source, weight, keep in zip(columns.tolist(), weights.tolist(), kept.tolist(), strict=True):
            if source in box_of and box_of[source] != at and (keep or (source, node) in links):
                inputs = boxes[at].inputs
                inputs[box_of[source]] = inputs.get(box_of[source], 0.0) + weight


def _connected(boxes: list[Box], path: Sequence[int]) -> list[Box]:
    """Without what hangs on nothing that is drawn, and then on nothing of the rest; tokens and targets stay."""
    ends, held = ("token", "target"), set(path)
    while True:
        feeding = {source for box in boxes for source in box.inputs}
        kept = [
            at for at, box in enumerate(boxes)
            if box.kind in ends or held & set(box.nodes) or (at in feeding and (box.inputs or box.kind == "error"))
        ]  # fmt: skip
        if len(kept) == len(boxes):
            return boxes
        new = {at: i for i, at in enumerate(kept)}
        for at in kept:
            boxes[at].inputs = {new[source]: w for source, w in boxes[at].inputs.items() if source in new}
        boxes = [boxes[at] for at in kept]


def _collapsed(graph: Graph, boxes: list[Box]) -> list[Box]:
    """In a long prompt, runs of tokens whose columns hold nothing else and feed nothing are one box each."""
    if graph.positions <= _COLLAPSE:
        return boxes
    used = {source for box in boxes for source in box.inputs}
    busy = {box.column for at, box in enumerate(boxes) if box.kind != "token" or at in used}
    kept = [box for box in boxes if box.column in busy]
    new = {at: i for i, at in enumerate(at for at, box in enumerate(boxes) if box.column in busy)}
    for box in kept:
        box.inputs = {new[source]: weight for source, weight in box.inputs.items()}
    idle = sorted((box for box in boxes if box.column not in busy), key=lambda box: box.column)
    for _, run in itertools.groupby(enumerate(idle), key=lambda pair: pair[1].column - pair[0]):
        held = [box for _, box in run]
        if len(held) > 1:
            nodes = [node for box in held for node in box.nodes]
            text, title = f"… {len(held)} …", " ".join(name(graph, node) for node in nodes)
            held = [Box(nodes, "token", text, title, -1, held[0].column, 0.0)]
        kept += held
    return kept


def _svg(boxes: list[Box], path: list[int], where: Place, left_out: int, layers: int) -> str:
    on_path = _path_boxes(boxes, path)
    legend, width, height = _legend(where, left_out)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui,sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    for at, (left, right) in enumerate(where.columns):
        if at % 2 == 0:
            parts.append(
                f'<rect x="{left - 4:.1f}" y="8" width="{right - left + 8:.1f}" height="{where.height - 12:.1f}" '
                f'rx="6" fill="{_FAINT}"/>'
            )
    for row, middle in where.rows:
        text = "output" if row == layers else "tokens" if row < 0 else f"layer {row}"
        parts.append(f'<text x="8" y="{middle + 4:.1f}" fill="{_GREY}" font-size="11">{text}</text>')
    parts += _curves(boxes, route(boxes, where.width), on_path)
    marked, most = {at for link in on_path for at in link}, _most(boxes)
    parts += [_shape(box, at in marked, most) for at, box in enumerate(boxes)]
    return "\n".join([*parts, *legend, "</svg>\n"])


def _legend(where: Place, left_out: int) -> tuple[list[str], float, float]:
    """What colours and sizes mean, in as many lines as it takes; (parts, width and height of the whole picture)."""
    width = max(where.width, LEFT + 260.0)
    items = [
        ("raises", _UP), ("lowers", _DOWN), ("strongest path", _PATH), ("bar: influence", _GREY),
        ("width: share of the input", _GREY),
    ]  # fmt: skip
    if left_out:
        items.append((f"{left_out} weaker {'box' if left_out == 1 else 'boxes'} not drawn", _GREY))
    parts, x, y = [], float(LEFT), where.height + 16
    for text, colour in items:
        wide = measure(text, 11)
        if x > LEFT and x + wide > width - 8:
            x, y = float(LEFT), y + 16
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="11">{escape(text)}</text>')
        x += wide + 18
    return parts, width, y + 10


def _path_boxes(boxes: Sequence[Box], path: Iterable[int]) -> set[tuple[int, int]]:
    """(source, target) boxes of each step of the path."""
    box_of = {node: at for at, box in enumerate(boxes) for node in box.nodes}
    steps = [box_of[node] for node in path if node in box_of]
    return {(a, b) for a, b in itertools.pairwise(steps) if a != b}


def _curves(boxes: Sequence[Box], curves: Iterable[Curve], path: set[tuple[int, int]]) -> list[str]:
    """As wide as their share of what enters the box; faint where the box matters little; the path above all."""
    most = _most(boxes) or 1.0
    drawn = []
    for curve in curves:
        box = boxes[curve.target]
        share = abs(box.inputs[curve.source]) / (sum(map(abs, box.inputs.values())) or 1.0)
        drawn.append(((curve.source, curve.target) in path, share, curve))
    parts = []
    for marked, share, (source, target, points) in sorted(drawn, key=lambda d: d[:2]):
        weight, box = boxes[target].inputs[source], boxes[target]
        matters = 1.0 if box.kind == "target" else min(1.0, box.influence / most) ** 0.5
        opacity = 0.95 if marked else min(0.75, (0.12 + 1.4 * share) * (0.3 + 0.7 * matters))
        colour = _PATH if marked else _UP if weight > 0 else _DOWN
        start, *bends = (f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<path d="M{start} C{" ".join(bends)}" fill="none" stroke="{colour}" '
            f'stroke-width="{(2 if marked else 0.6) + 4.5 * share:.1f}" stroke-opacity="{opacity:.2f}">'
            f"<title>{escape(boxes[source].text)} to {escape(box.text)}: {weight:+.3f}, "
            f"{100 * share:.0f}% of what is drawn</title></path>"
        )
    return parts


def _shape(box: Box, marked: bool, most: float) -> str:
    line = _PATH if marked else _LINE[box.kind]
    dash = ' stroke-dasharray="3,3"' if box.kind == "error" else ""
    x, y, wide, tall = box.x, box.y, box.width, box.height
    parts = [
        f'<g><title>{escape(box.title)}</title><rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall}" '
        f'rx="5" fill="{_FILL[box.kind]}" stroke="{line}" stroke-width="{2 if marked else 1}"{dash}/>'
        f'<text x="{x + wide / 2:.1f}" y="{y + tall / 2 + 0.28 * box.size:.1f}" font-size="{box.size}" '
        f'text-anchor="middle">{escape(box.text)}</text>'
    ]
    if box.kind in ("feature", "error") and most > 0:
        bar = f'h{(wide - 8) * min(1.0, box.influence / most):.1f}" stroke="{_LINE[box.kind]}" stroke-width="2"/>'
        parts.append(f'<path d="M{x + 4:.1f},{y + tall - 2.5:.1f} {bar}')
    return "".join([*parts, "</g>"])


def _most(boxes: Iterable[Box]) -> float:
    """The influence of the feature or error that has most."""
    return max((box.influence for box in boxes if box.kind in ("feature", "error")), default=0.0)
