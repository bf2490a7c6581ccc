"""A graph as a picture: SVG, written by hand, so that no plotting library is asked for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from pycircuit.ops import checks

from . import files
from .supernodes import key
from .tree import name, plain, strongest

if TYPE_CHECKING:
    from .graph import Graph
    from .prune import Pruned

_LETTER = 6.6  # pixels of one, on average, at the size that is set
_BOX, _GAP, _ROW = 22, 6, 26  # height of a box, between boxes, between rows of layers
_LEFT, _MOST = 64, 22  # pixels for the names of rows; letters of a label
_FILL = {"feature": "#e8f0fb", "error": "#f3f3f3", "token": "#fdf3dc", "target": "#e4f5e6"}
_LINE = {"feature": "#5b84c4", "error": "#a8a8a8", "token": "#c79a3a", "target": "#4c9a57"}
_UP, _DOWN, _PATH = "#3d7bd9", "#d9534f", "#e07b00"


@dataclass
class _Box:
    """Nodes drawn as one. row: -1 for tokens, a layer, or the number of layers for targets."""

    nodes: list[int]
    kind: str
    text: str
    title: str
    row: int
    column: int
    x: float = 0
    y: float = 0
    width: float = 0
    inputs: dict[int, float] = field(default_factory=dict)  # weights from other boxes

    @property
    def letters(self) -> str:
        return self.text if len(self.text) <= _MOST else self.text[: _MOST - 1] + "…"


def plot(
    graph: Graph,
    path: str | os.PathLike[str],
    node_threshold: float,
    edge_threshold: float,
    max_nodes: int,
    target: int,
) -> None:
    where = files.writable("plot", path)
    checks.whole("plot", "max_nodes", max_nodes, 1)
    graph.target_node(target)
    pruned = graph.prune(node_threshold, edge_threshold)
    best = strongest(graph, target)
    path_nodes = [] if best is None else list(best.nodes)
    boxes, left_out = _boxes(pruned, max_nodes, set(path_nodes))
    _edges(pruned, boxes, path_nodes)
    boxes = _connected(boxes, path_nodes)
    width, height, columns = _place(graph, boxes)
    files.write_text(where, _svg(graph, boxes, path_nodes, left_out, columns, width, height))


def _boxes(pruned: Pruned, most: int, path: set[int]) -> tuple[list[_Box], int]:
    """Tokens and targets, and of the others the most influential; how many of those were left out."""
    graph, influence = pruned.whole, pruned.influence
    groups: dict[object, list[int]] = {}
    for node in sorted({*pruned.node_mask.nonzero()[:, 0].tolist(), *path}):
        groups.setdefault(_group(graph, node), []).append(node)
    inner = [g for g in groups.values() if g[0] < graph.first_token]
    inner.sort(key=lambda g: (-len(path & set(g)), -float(influence[g].sum())))
    ends = [g for g in groups.values() if g[0] >= graph.first_token]
    return [_box(graph, nodes) for nodes in [*inner[:most], *ends]], max(0, len(inner) - most)


def _group(graph: Graph, node: int) -> object:
    """Features of one label at one place are one box."""
    if node >= graph.first_error:
        return node
    layer, _, feature = graph.features[node].tolist()
    return key(graph, node) if (layer, feature) in graph.labels else node


def _box(graph: Graph, nodes: list[int]) -> _Box:
    about = [graph.describe(node) for node in nodes]
    first, kind = about[0], about[0]["kind"]
    row = {"token": -1, "target": graph.layers}.get(kind, min(a.get("layer", 0) for a in about))
    if kind == "target":
        text = f"{plain(first['label'])} {100 * first['weight']:.0f}%"
    elif kind == "error":
        text = "error"
    else:
        text = plain(first.get("label") or f"L{first['layer']}/{first['feature']}")
    if len(nodes) > 1:
        text += f" ×{len(nodes)}"
    return _Box(nodes, kind, text, "\n".join(name(graph, node) for node in nodes), row, first["position"])


def _edges(pruned: Pruned, boxes: list[_Box], path: Sequence[int]) -> None:
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


def _connected(boxes: list[_Box], path: Sequence[int]) -> list[_Box]:
    """Without what hangs on nothing that is drawn; tokens and targets stay."""
    feeding = {source for box in boxes for source in box.inputs}
    kept = [
        at for at, box in enumerate(boxes)
        if box.kind in ("token", "target") or (at in feeding and box.inputs) or set(box.nodes) & set(path)
    ]  # fmt: skip
    new = {at: i for i, at in enumerate(kept)}
    for at in kept:
        boxes[at].inputs = {new[s]: w for s, w in boxes[at].inputs.items() if s in new}
    return [boxes[at] for at in kept]


def _place(graph: Graph, boxes: list[_Box]) -> tuple[float, float, list[tuple[int, float]]]:
    """Give every box its place; (width, height, the middle of each column drawn)."""
    cells: dict[tuple[int, int], list[_Box]] = {}
    for box in boxes:
        box.width = _LETTER * len(box.letters) + 12
        cells.setdefault((box.row, box.column), []).append(box)
    x, columns = float(_LEFT), []
    for column in sorted({box.column for box in boxes}):
        wide = max(box.width for box in boxes if box.column == column)
        for box in boxes:
            if box.column == column:
                box.x = x + (wide - box.width) / 2
        columns.append((column, x + wide / 2))
        x += wide + 18
    y = float(_ROW)
    for row in range(graph.layers, -2, -1):
        stacks = [cell for (r, _), cell in cells.items() if r == row]
        tall = max((len(cell) for cell in stacks), default=1) * (_BOX + _GAP)
        for cell in stacks:
            for at, box in enumerate(cell):
                box.y = y + (tall - len(cell) * (_BOX + _GAP)) / 2 + at * (_BOX + _GAP)
        y += tall + _ROW
    return x, y + 14, columns


def _svg(
    graph: Graph, boxes: list[_Box], path: list[int], left_out: int, columns: list[tuple[int, float]], width: float,
    height: float,
) -> str:  # fmt: skip
    note = f"{left_out} weaker groups are not drawn" if left_out else ""
    width = max(width, _LEFT + _LETTER * max(len(note), 60))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui,sans-serif" font-size="12">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    for row in sorted({box.row for box in boxes if box.row >= 0 and box.kind != "target"}):
        middle = sum(b.y for b in boxes if b.row == row) / sum(b.row == row for b in boxes) + _BOX / 2
        parts.append(f'<text x="8" y="{middle + 4:.1f}" fill="#777">layer {row}</text>')
    on_path = _path_boxes(boxes, path)
    parts += _curves(boxes, on_path)
    parts += [_shape(box, at in {b for link in on_path for b in link}) for at, box in enumerate(boxes)]
    legend = "blue raises, red lowers, orange is the strongest path" + (f"; {note}" if note else "")
    parts.append(f'<text x="{_LEFT}" y="{height - 8:.1f}" fill="#777" font-size="11">{escape(legend)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _path_boxes(boxes: list[_Box], path: list[int]) -> set[tuple[int, int]]:
    """(source, target) boxes of each step of the path."""
    box_of = {node: at for at, box in enumerate(boxes) for node in box.nodes}
    steps = [box_of[node] for node in path if node in box_of]
    return {(a, b) for a, b in itertools.pairwise(steps) if a != b}


def _curves(boxes: list[_Box], path: set[tuple[int, int]]) -> list[str]:
    """Weak ones first, so that strong ones lie above; as wide as their share of what enters the box."""
    drawn = []
    for at, box in enumerate(boxes):
        mass = sum(map(abs, box.inputs.values())) or 1.0
        for source, weight in box.inputs.items():
            drawn.append(((source, at) in path, abs(weight) / mass, weight, boxes[source], box))
    parts = []
    for marked, share, weight, a, b in sorted(drawn, key=lambda d: d[:2]):
        x0, y0, x1, y1 = a.x + a.width / 2, a.y, b.x + b.width / 2, b.y + _BOX
        bend = max(24.0, abs(y0 - y1) / 2)
        colour = _PATH if marked else _UP if weight > 0 else _DOWN
        opacity = 0.95 if marked else min(0.7, 0.12 + 1.6 * share)
        parts.append(
            f'<path d="M{x0:.1f},{y0:.1f} C{x0:.1f},{y0 - bend:.1f} {x1:.1f},{y1 + bend:.1f} {x1:.1f},{y1:.1f}" '
            f'fill="none" stroke="{colour}" stroke-width="{0.6 + 5 * share:.1f}" stroke-opacity="{opacity:.2f}">'
            f"<title>{escape(a.letters)} to {escape(b.letters)}: {weight:+.3f}</title></path>"
        )
    return parts


def _shape(box: _Box, marked: bool) -> str:
    line = _PATH if marked else _LINE[box.kind]
    dash = ' stroke-dasharray="3,3"' if box.kind == "error" else ""
    return (
        f'<g><title>{escape(box.title)}</title><rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{_BOX}" rx="5" fill="{_FILL[box.kind]}" stroke="{line}" stroke-width="{2 if marked else 1}"{dash}/>'
        f'<text x="{box.x + box.width / 2:.1f}" y="{box.y + 15:.1f}" text-anchor="middle">{escape(box.letters)}</text>'
        "</g>"
    )
