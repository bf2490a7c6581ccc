"""Line charts side by side, as SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite

_WIDTH, _HEIGHT, _MARGIN = 300, 200, 46
_POINTS = 300  # of a line at most: about one a pixel


@dataclass(frozen=True)
class Panel:
    """One chart. lines: values by name, at equal steps from the label `left` to the label `right`."""

    title: str
    lines: Mapping[str, Sequence[float]]
    left: str
    right: str


def _colour(index: int, count: int) -> str:
    """Colour of a line: from blue to red in the order of the lines."""
    return f"hsl({240 - 240 * index / max(1, count - 1):.0f},65%,45%)"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _line(values: Sequence[float], low: float, high: float, colour: str, name: str) -> str:
    """Polyline over the panel's inside; values that are not finite are left out."""
    step = max(1, -(-len(values) // _POINTS))
    shown = [*range(0, len(values), step), *([len(values) - 1] if (len(values) - 1) % step else [])]
    inside = _HEIGHT - 2 * _MARGIN
    points = [
        f"{_MARGIN + (_WIDTH - 2 * _MARGIN) * i / max(1, len(values) - 1):.1f},"
        f"{_HEIGHT - _MARGIN - inside * (values[i] - low) / (high - low):.1f}"
        for i in shown
        if isfinite(values[i])
    ]
    title = f"<title>{escape(name)}</title>"
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5">{title}</polyline>'


def _panel(panel: Panel) -> list[str]:
    finite = [v for values in panel.lines.values() for v in values if isfinite(v)] or [0.0]
    low, high = min(0.0, *finite), max(finite)
    high = high if high > low else low + 1.0
    left, right = _MARGIN, _WIDTH - _MARGIN
    top, bottom = _MARGIN, _HEIGHT - _MARGIN
    elements = [
        f'<text x="{_WIDTH / 2}" y="{top - 16}" text-anchor="middle" font-weight="bold">{escape(panel.title)}</text>',
        f'<path d="M{left},{top} V{bottom} H{right}" fill="none" stroke="#888"/>',
        f'<text x="{left - 4}" y="{top + 4}" text-anchor="end">{_number(high)}</text>',
        f'<text x="{left - 4}" y="{bottom + 4}" text-anchor="end">{_number(low)}</text>',
        f'<text x="{left}" y="{bottom + 16}">{escape(panel.left)}</text>',
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{escape(panel.right)}</text>',
    ]
    for index, (name, values) in enumerate(panel.lines.items()):
        elements.append(_line(values, low, high, _colour(index, len(panel.lines)), name))
    return elements


def _legend(names: Sequence[str], y: int) -> list[str]:
    elements, x = [], _MARGIN
    for index, name in enumerate(names):
        elements.append(f'<text x="{x}" y="{y}" fill="{_colour(index, len(names))}">{escape(name)}</text>')
        x += 8 * len(name) + 12
    return elements


def chart(panels: Sequence[Panel]) -> str:
    """Draw panels in one row as SVG."""
    width, height = _WIDTH * len(panels), _HEIGHT + 24
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        elements += [f'<g transform="translate({index * _WIDTH},0)">', *_panel(panel), "</g>"]
    most_lines = max((panel.lines for panel in panels), key=len)
    if len(most_lines) > 1:
        elements += _legend(list(most_lines), _HEIGHT + 10)
    return "\n".join([*elements, "</svg>\n"])
