"""Picture of a graph: SVG, written without a plotting library."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from pycircuit.files.atomic import writable_svg, write_text
from pycircuit.graph.paths import strongest_path
from pycircuit.graph.supernodes import key
from pycircuit.ops import checks

from .layout import LEFT, Box, Curve, Layout, lay_out, measure, route, shorten
from .node_names import name, plain

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph
    from pycircuit.graph.prune import Pruned

_LABEL_WIDTH = 150  # pixels of a label
_COLLAPSE_FROM = 24  # positions of a prompt whose idle tokens are drawn as one box
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
    """Draw a graph and write the picture."""
    svg_path = writable_svg("plot", path)
    checks.whole_number("plot", "max_nodes", max_nodes, 1)
    if not isinstance(group, bool):
        raise TypeError(f"plot: group must be True or False, got {type(group).__name__}")
    graph.target_node(target)
    pruned = graph.prune(node_threshold, edge_threshold)
    best = strongest_path(graph, target)
    path_nodes = [] if best is None else list(best.nodes)
    boxes, inner = _boxes(pruned, max_nodes, set(path_nodes), group)
    _edges(pruned, boxes, path_nodes)
    boxes = _collapsed(graph, _connected(boxes, path_nodes))
    left_out = inner - sum(box.kind in ("feature", "error") for box in boxes)
    layout = lay_out(boxes, graph.layers)
    write_text("plot", svg_path, _svg(boxes, path_nodes, layout, left_out, graph.layers))


def _boxes(pruned: Pruned, limit: int, path: set[int], group: bool) -> tuple[list[Box], int]:
    """(boxes of tokens, targets, the path and the most influential others; number of boxes but tokens and targets)."""
    graph, influence = pruned.original, pruned.influence
    groups: dict[object, list[int]] = {}
    for node in sorted({*pruned.node_mask.nonzero()[:, 0].tolist(), *path}):
        groups.setdefault(_group(graph, node) if group else node, []).append(node)
    inner = [g for g in groups.values() if g[0] < graph.first_token]
    inner.sort(key=lambda g: (-len(path & set(g)), -float(influence[g].sum())))
    ends = [g for g in groups.values() if g[0] >= graph.first_token]
    chosen = [*inner[: max(limit, sum(not path.isdisjoint(g) for g in inner))], *ends]
    return [_box(graph, nodes, float(influence[nodes].sum())) for nodes in chosen], len(inner)


def _group(graph: Graph, node: int) -> object:
    """Key of a node's box: features of one label at one position share one."""
    if node >= graph.first_error:
        return node
    layer, _, feature = graph.features[node].tolist()
    return key(graph, node) if graph.labels.get((layer, feature)) else node


def _box(graph: Graph, nodes: list[int], influence: float) -> Box:
    descriptions = [graph.describe(node) for node in nodes]
    first, kind = descriptions[0], descriptions[0]["kind"]
    row = {"token": -1, "target": graph.layers}.get(kind, min(d.get("layer", 0) for d in descriptions))
    size, suffix = 12, f" ×{len(nodes)}" if len(nodes) > 1 else ""
    if kind == "target":
        text, suffix, influence = plain(first["label"]), f" {100 * first['weight']:.0f}%", first["weight"]
    elif kind == "error":
        text, size = "error", 10
    elif kind == "token":
        text = plain(first["label"])
    else:
        text = plain(first.get("label") or f"L{first['layer']}/{first['feature']}")
    text = shorten(text, size, _LABEL_WIDTH) + suffix
    title = "\n".join(name(graph, [node]) for node in nodes)
    return Box(nodes, kind, text, f"{title}\ninfluence {influence:.3f}", row, first["position"], influence)


def _edges(pruned: Pruned, boxes: list[Box], path: Sequence[int]) -> None:
    """Set the weights from box to box: sums over the pruned edges between their nodes and the edges of the path."""
    graph = pruned.original
    box_of = {node: index for index, box in enumerate(boxes) for node in box.nodes}
    row = {node: r for r, node in enumerate(graph.row_node.tolist())}
    starts = graph.rows.row_ptr.tolist()
    links = set(itertools.pairwise(path))
    for node, index in box_of.items():
        if node not in row:
            continue
        columns, weights = graph.rows.row(row[node])
        mask = pruned.edge_mask[starts[row[node]] : starts[row[node] + 1]]
        for source, weight, drawn in zip(columns.tolist(), weights.tolist(), mask.tolist(), strict=True):
            if source in box_of and box_of[source] != index and (drawn or (source, node) in links):
                inputs = boxes[index].inputs
                inputs[box_of[source]] = inputs.get(box_of[source], 0.0) + weight


def _connected(boxes: list[Box], path: Sequence[int]) -> list[Box]:
    """Remove boxes without connections until none is left; boxes of tokens, targets and the path stay."""
    ends = ("token", "target")
    path_nodes = set(path)
    while True:
        feeding = {source for box in boxes for source in box.inputs}
        remaining = [
            index
            for index, box in enumerate(boxes)
            if box.kind in ends
            or path_nodes & set(box.nodes)
            or (index in feeding and (box.inputs or box.kind == "error"))
        ]
        if len(remaining) == len(boxes):
            return boxes
        new = {index: i for i, index in enumerate(remaining)}
        for index in remaining:
            boxes[index].inputs = {new[source]: w for source, w in boxes[index].inputs.items() if source in new}
        boxes = [boxes[index] for index in remaining]


def _collapsed(graph: Graph, boxes: list[Box]) -> list[Box]:
    """Merge runs of idle tokens in a long prompt into one box each: tokens alone in their column that feed nothing."""
    if graph.positions <= _COLLAPSE_FROM:
        return boxes
    used = {source for box in boxes for source in box.inputs}
    busy = {box.column for index, box in enumerate(boxes) if box.kind != "token" or index in used}
    remaining = [box for box in boxes if box.column in busy]
    new = {index: i for i, index in enumerate(index for index, box in enumerate(boxes) if box.column in busy)}
    for box in remaining:
        box.inputs = {new[source]: weight for source, weight in box.inputs.items()}
    idle = sorted((box for box in boxes if box.column not in busy), key=lambda box: box.column)
    for _, run in itertools.groupby(enumerate(idle), key=lambda pair: pair[1].column - pair[0]):
        run_boxes = [box for _, box in run]
        if len(run_boxes) > 1:
            nodes = [node for box in run_boxes for node in box.nodes]
            text, title = f"… {len(run_boxes)} …", " ".join(name(graph, [node]) for node in nodes)
            run_boxes = [Box(nodes, "token", text, title, -1, run_boxes[0].column, 0.0)]
        remaining += run_boxes
    return remaining


def _svg(boxes: list[Box], path: list[int], layout: Layout, left_out: int, layers: int) -> str:
    on_path = _path_boxes(boxes, path)
    legend, width, height = _legend(layout, left_out)
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui,sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    for index, (left, right) in enumerate(layout.columns):
        if index % 2 == 0:
            elements.append(
                f'<rect x="{left - 4:.1f}" y="8" width="{right - left + 8:.1f}" height="{layout.height - 12:.1f}" '
                f'rx="6" fill="{_FAINT}"/>'
            )
    for row, middle in layout.rows:
        text = "output" if row == layers else "tokens" if row < 0 else f"layer {row}"
        elements.append(f'<text x="8" y="{middle + 4:.1f}" fill="{_GREY}" font-size="11">{text}</text>')
    elements += _curves(boxes, route(boxes, layout.width), on_path)
    marked = {index for link in on_path for index in link}
    highest = _highest_influence(boxes)
    elements += [_shape(box, index in marked, highest) for index, box in enumerate(boxes)]
    return "\n".join([*elements, *legend, "</svg>\n"])


def _legend(layout: Layout, left_out: int) -> tuple[list[str], float, float]:
    """Explain colours and sizes: (elements of the legend, width and height of the picture with it)."""
    width = max(layout.width, LEFT + 260.0)
    items = [
        ("raises", _UP),
        ("lowers", _DOWN),
        ("strongest path", _PATH),
        ("bar: influence", _GREY),
        ("width: share of the input", _GREY),
    ]
    if left_out:
        items.append((f"{left_out} weaker {'box' if left_out == 1 else 'boxes'} not drawn", _GREY))
    elements: list[str] = []
    x, y = float(LEFT), layout.height + 16
    for text, colour in items:
        text_width = measure(text, 11)
        if x > LEFT and x + text_width > width - 8:
            x, y = float(LEFT), y + 16
        elements.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="11">{escape(text)}</text>')
        x += text_width + 18
    return elements, width, y + 10


def _path_boxes(boxes: Sequence[Box], path: Iterable[int]) -> set[tuple[int, int]]:
    """Pairs (source, target) of boxes along the path."""
    box_of = {node: index for index, box in enumerate(boxes) for node in box.nodes}
    steps = [box_of[node] for node in path if node in box_of]
    return {(a, b) for a, b in itertools.pairwise(steps) if a != b}


def _curves(boxes: Sequence[Box], curves: Iterable[Curve], path: set[tuple[int, int]]) -> list[str]:
    """SVG of the curves: as wide as their share of a box's input, faint for boxes of little influence, path on top."""
    highest = _highest_influence(boxes) or 1.0
    drawn = []
    for curve in curves:
        box = boxes[curve.target]
        share = abs(box.inputs[curve.source]) / (sum(map(abs, box.inputs.values())) or 1.0)
        drawn.append(((curve.source, curve.target) in path, share, curve))
    elements = []
    for marked, share, (source, target, points) in sorted(drawn, key=lambda d: d[:2]):
        weight, box = boxes[target].inputs[source], boxes[target]
        importance = 1.0 if box.kind == "target" else min(1.0, box.influence / highest) ** 0.5
        opacity = 0.95 if marked else min(0.75, (0.12 + 1.4 * share) * (0.3 + 0.7 * importance))
        colour = _PATH if marked else _UP if weight > 0 else _DOWN
        start, *bends = (f"{x:.1f},{y:.1f}" for x, y in points)
        elements.append(
            f'<path d="M{start} C{" ".join(bends)}" fill="none" stroke="{colour}" '
            f'stroke-width="{(2 if marked else 0.6) + 4.5 * share:.1f}" stroke-opacity="{opacity:.2f}">'
            f"<title>{escape(boxes[source].text)} to {escape(box.text)}: {weight:+.3f}, "
            f"{100 * share:.0f}% of what is drawn</title></path>"
        )
    return elements


def _shape(box: Box, marked: bool, highest: float) -> str:
    line = _PATH if marked else _LINE[box.kind]
    dash = ' stroke-dasharray="3,3"' if box.kind == "error" else ""
    x, y, width, height = box.x, box.y, box.width, box.height
    elements = [
        f'<g><title>{escape(box.title)}</title><rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" '
        f'rx="5" fill="{_FILL[box.kind]}" stroke="{line}" stroke-width="{2 if marked else 1}"{dash}/>'
        f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 0.28 * box.size:.1f}" font-size="{box.size}" '
        f'text-anchor="middle">{escape(box.text)}</text>'
    ]
    if box.kind in ("feature", "error") and highest > 0:
        bar = f'h{(width - 8) * min(1.0, box.influence / highest):.1f}" stroke="{_LINE[box.kind]}" stroke-width="2"/>'
        elements.append(f'<path d="M{x + 4:.1f},{y + height - 2.5:.1f} {bar}')
    return "".join([*elements, "</g>"])


def _highest_influence(boxes: Iterable[Box]) -> float:
    """Highest influence of a box of features or errors."""
    return max((box.influence for box in boxes if box.kind in ("feature", "error")), default=0.0)
