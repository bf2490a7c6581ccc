"""Line charts side by side, as SVG: no plotting library is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite

_WIDTH, _HEIGHT, _MARGIN = 300, 200, 46
_POINTS = 300  # of a line; more than there are pixels would only make the file larger


@dataclass(frozen=True)
class Panel:
    """lines: values by name, at equal steps from `left` to `right`."""

    title: str
    lines: Mapping[str, Sequence[float]]
    left: str
    right: str


def _colour(at: int, of: int) -> str:
    """From blue to red, in the order of the lines."""
    return f"hsl({240 - 240 * at / max(1, of - 1):.0f},65%,45%)"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _line(values: Sequence[float], low: float, high: float, colour: str, name: str) -> str:
    """One polyline over the panel's inside; what is not finite is left out."""
    step = max(1, -(-len(values) // _POINTS))
    at = [*range(0, len(values), step), *([len(values) - 1] if (len(values) - 1) % step else [])]
    inside = _HEIGHT - 2 * _MARGIN
    points = [
        f"{_MARGIN + (_WIDTH - 2 * _MARGIN) * i / max(1, len(values) - 1):.1f},"
        f"{_HEIGHT - _MARGIN - inside * (values[i] - low) / (high - low):.1f}"
        for i in at
        if isfinite(values[i])
    ]
    title = f"<title>{escape(name)}</title>"
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5">{title}</polyline>'


def _panel(panel: Panel) -> list[str]:
    finite = [v for values in panel.lines.values() for v in values if isfinite(v)] or [0.0]
    low, high = min(0.0, *finite), max(finite)
    high = high if high > low else low + 1.0
    left, right, top, bottom = _MARGIN, _WIDTH - _MARGIN, _MARGIN, _HEIGHT - _MARGIN
    parts = [
        f'<text x="{_WIDTH / 2}" y="{top - 16}" text-anchor="middle" font-weight="bold">{escape(panel.title)}</text>',
        f'<path d="M{left},{top} V{bottom} H{right}" fill="none" stroke="#888"/>',
        f'<text x="{left - 4}" y="{top + 4}" text-anchor="end">{_number(high)}</text>',
        f'<text x="{left - 4}" y="{bottom + 4}" text-anchor="end">{_number(low)}</text>',
        f'<text x="{left}" y="{bottom + 16}">{escape(panel.left)}</text>',
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{escape(panel.right)}</text>',
    ]
    for at, (name, values) in enumerate(panel.lines.items()):
        parts.append(_line(values, low, high, _colour(at, len(panel.lines)), name))
    return parts


def _legend(names: Sequence[str], y: int) -> list[str]:
    parts, x = [], _MARGIN
    for at, name in enumerate(names):
        parts.append(f'<text x="{x}" y="{y}" fill="{_colour(at, len(names))}">{escape(name)}</text>')
        x += 8 * len(name) + 12
    return parts


def chart(panels: Sequence[Panel]) -> str:
    """An SVG of panels in one row."""
    width, height = _WIDTH * len(panels), _HEIGHT + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for at, panel in enumerate(panels):
        parts += [f'<g transform="translate({at * _WIDTH},0)">', *_panel(panel), "</g>"]
    many = max((panel.lines for panel in panels), key=len)
    if len(many) > 1:
        parts += _legend(list(many), _HEIGHT + 10)
    return "\n".join([*parts, "</svg>\n"])
