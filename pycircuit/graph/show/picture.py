"""Picture of boxes and edges: SVG, for light and dark surroundings, written without a plotting library."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from pycircuit.files.atomic import writable_svg, write_text

from .layout import ERRORS, LEFT, TOKENS, Box, Curve, Layout, measure, route
from .node_names import percent

# Fill, line and text of a kind of box; for light surroundings, then for dark ones. Blue and vermilion are told apart by
# people who see red and green alike; edges that lower are dashed besides.
_BOXES = {
    "feature": ("#eaf1fb", "#5b84c4", "#1d2733"), "error": ("#f3f3f3", "#9a9a9a", "#555555"),
    "token": ("#fbf6e6", "#b59a52", "#1d2733"), "target": ("#e6f4ee", "#3f8f6b", "#1d2733"),
}  # fmt: skip
_DARK_BOXES = {
    "feature": ("#1f3350", "#7ea6e0", "#eaf1fb"), "error": ("#2c2c2e", "#8a8a8a", "#c8c8c8"),
    "token": ("#39331f", "#c9ae66", "#f5ecd2"), "target": ("#1d3a2e", "#6fc49b", "#e6f4ee"),
}  # fmt: skip
_COLOURS = {
    "back": "#ffffff", "column": "#f6f7f9", "note": "#5c6670", "up": "#1f6fb4", "down": "#d1570f", "halo": "#f5c400",
}  # fmt: skip
_DARK = {
    "back": "#16191d", "column": "#1e2227", "note": "#a7b0ba", "up": "#6db3f2", "down": "#ff9a5c", "halo": "#c79a00",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An SVG picture: notebooks show it, `save` writes it, `svg` is its text."""

    svg: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, atomically."""
        write_text("Picture.save", writable_svg("Picture.save", path), self.svg)

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"Picture({len(self.svg)} characters of SVG; Picture.save(path) writes it)"


def draw(boxes: Sequence[Box], layout: Layout, path: Sequence[int], layers: int, notes: Sequence[str]) -> str:
    """SVG of boxes that are laid out. path: nodes of the strongest path; notes: what was left out."""
    on_path = _path_boxes(boxes, path)
    drawn = [box for box in boxes if box.kind != "gap"]
    legend, width, height = _legend(boxes, layout, bool(on_path), notes)
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pycircuit" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="Attribution graph" '
        f'style="max-width:100%;height:auto" font-family="system-ui,sans-serif" font-size="12">',
        f"<style>{_dark_style()}</style>",
        f'<rect class="pc-back" width="{width:.0f}" height="{height:.0f}" fill="{_COLOURS["back"]}"/>',
    ]
    for index, (left, right) in enumerate(layout.columns):
        if index % 2 == 0:
            elements.append(
                f'<rect class="pc-column" x="{left - 4:.1f}" y="8" width="{right - left + 8:.1f}" '
                f'height="{layout.height - 12:.1f}" rx="6" fill="{_COLOURS["column"]}"/>'
            )
    for row, middle in layout.rows:
        text = {layers: "output", TOKENS: "tokens", ERRORS: "errors"}.get(row, f"layer {row}")
        elements.append(_note(8, middle + 4, text))
    elements += _curves(boxes, route(drawn, layout.width), on_path)
    marked = {index for link in on_path for index in link}
    highest = _highest_influence(boxes)
    elements += [_shape(box, index in marked, highest) for index, box in enumerate(boxes)]
    return "\n".join([*elements, *legend, "</svg>\n"])


def _dark_style() -> str:
    """Colours for dark surroundings; without them the attributes of the elements hold."""
    rules = [(f"pc-{name}", f"fill:{_DARK[name]}") for name in ("back", "column", "note")]
    rules += [(f"pc-{name}", f"stroke:{_DARK[name]}") for name in ("up", "down", "halo")]
    rules += [(f"pc-{name}-text", f"fill:{_DARK[name]}") for name in ("up", "down")]
    for kind, (fill, line, text) in _DARK_BOXES.items():
        rules.append((f"pc-{kind} rect", f"fill:{fill};stroke:{line}"))
        rules.append((f"pc-{kind} text", f"fill:{text}"))
        rules.append((f"pc-{kind} path", f"stroke:{line}"))
    return f"@media (prefers-color-scheme:dark){{{''.join(f'.pycircuit .{name}{{{body}}}' for name, body in rules)}}}"


def _note(x: float, y: float, text: str, name: str = "note") -> str:
    colour = _COLOURS[name]
    css = "pc-note" if name == "note" else f"pc-{name}-text"
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="11">{escape(text)}</text>'


def _legend(boxes: Sequence[Box], layout: Layout, path: bool, notes: Sequence[str]) -> tuple[list[str], float, float]:
    """Explain signs and sizes: (elements of the legend, width and height of the picture with it)."""
    width = max(layout.width, LEFT + 260.0)
    kinds = {box.kind for box in boxes}
    items = [("━ raises", "up"), ("╍ lowers", "down")]
    items += [("yellow: strongest path", "note")] * path
    items += [("width: share of the input", "note")]
    items += [("bar: influence", "note")] * ("feature" in kinds)
    items += [("italic: automatic label", "note")] * any(box.automatic for box in boxes)
    items += [("⋯ tokens not drawn", "note")] * ("gap" in kinds)
    items += [(note, "note") for note in notes]
    elements: list[str] = []
    x, y = float(LEFT), layout.height + 16
    for text, colour in items:
        text_width = measure(text, 11)
        if x > LEFT and x + text_width > width - 8:
            x, y = float(LEFT), y + 16
        elements.append(_note(x, y, text, colour))
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
        opacity = 0.95 if marked else min(0.85, (0.15 + 1.4 * share) * (0.35 + 0.65 * importance))
        sign, dash = ("up", "") if weight > 0 else ("down", ' stroke-dasharray="5,3"')
        width = 0.8 + 4.5 * share
        start, *bends = (f"{x:.1f},{y:.1f}" for x, y in points)
        shape = f'd="M{start} C{" ".join(bends)}" fill="none"'
        if marked:
            elements.append(
                f'<path class="pc-halo" {shape} stroke="{_COLOURS["halo"]}" stroke-width="{width + 6:.1f}" '
                'stroke-opacity="0.75"/>'
            )
        elements.append(
            f'<path class="pc-{sign}{" pc-path" * marked}" {shape} stroke="{_COLOURS[sign]}" '
            f'stroke-width="{width:.1f}" stroke-opacity="{opacity:.2f}"{dash}>'
            f"<title>{escape(boxes[source].text)} to {escape(box.text)}: {weight:+.3g}, "
            f"{percent(share)} of what is drawn</title></path>"
        )
    return elements


def _shape(box: Box, marked: bool, highest: float) -> str:
    x, y, width, height = box.x, box.y, box.width, box.height
    if box.kind == "gap":
        return f"<g><title>{escape(box.title)}</title>{_note(x, y + height / 2 + 4, box.text)}</g>"
    fill, line, colour = _BOXES[box.kind]
    dash = ' stroke-dasharray="3,3"' if box.kind == "error" else ""
    style = ' font-style="italic"' if box.automatic else ""
    halo = (
        f'<rect class="pc-halo" x="{x - 2:.1f}" y="{y - 2:.1f}" width="{width + 4:.1f}" height="{height + 4}" rx="7" '
        f'fill="none" stroke="{_COLOURS["halo"]}" stroke-width="4" stroke-opacity="0.75"/>'
    )
    elements = [
        f'{halo * marked}<g class="pc-{box.kind}"><title>{escape(box.title)}</title>'
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" '
        f'rx="5" fill="{fill}" stroke="{line}"{dash}/>'
        f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 0.28 * box.size:.1f}" font-size="{box.size}" '
        f'fill="{colour}" text-anchor="middle"{style}>{escape(box.text)}</text>'
    ]
    if box.kind in ("feature", "error") and highest > 0:
        bar = f'h{(width - 8) * min(1.0, box.influence / highest):.1f}" stroke="{line}" stroke-width="2"/>'
        elements.append(f'<path d="M{x + 4:.1f},{y + height - 2.5:.1f} {bar}')
    return "".join([*elements, "</g>"])


def _highest_influence(boxes: Iterable[Box]) -> float:
    """Highest influence of a box of features or errors."""
    return max((box.influence for box in boxes if box.kind in ("feature", "error")), default=0.0)
