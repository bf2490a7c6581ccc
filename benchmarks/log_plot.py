"""Log-log charts side by side, as SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 340, 56, 92, 34, 44
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5fbf", "#444444", "#c07a1a")


@dataclass(frozen=True)
class LogPanel:
    """One chart. lines: (x, y) points by name, all above zero; ticks: labelled places of the x axis."""

    title: str
    x_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    ticks: Sequence[float]


@dataclass(frozen=True)
class _Axis:
    """Linear map from the logarithm of low .. high to start .. end in the picture."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))
        return self.start + share * (self.end - self.start)


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around the values, two different ones."""
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def spread_labels(places: Sequence[float], distance: float) -> list[float]:
    """Move labels down until each is `distance` below the one above it: [n], in the order of `places`."""
    moved = list(places)
    last = -distance
    for index in sorted(range(len(places)), key=lambda i: places[i]):
        moved[index] = last = max(places[index], last + distance)
    return moved


def _axes(panel: LogPanel, x: _Axis, y: _Axis) -> list[str]:
    elements = [
        f'<text x="{(x.start + x.end) / 2}" y="{TOP - 14}" text-anchor="middle" font-weight="bold">'
        f"{escape(panel.title)}</text>",
        f'<text x="{(x.start + x.end) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(panel.x_label)}</text>',
    ]
    for tick in panel.ticks:
        place = x.place(tick)
        elements += [
            f'<path d="M{place:.1f},{y.end} V{y.start}" stroke="#e4e4e4"/>',
            f'<text x="{place:.1f}" y="{y.start + 16}" text-anchor="middle">{tick:,.0f}</text>',
        ]
    for decade in range(round(log10(y.low)), round(log10(y.high)) + 1):
        place = y.place(10.0**decade)
        elements += [
            f'<path d="M{x.start},{place:.1f} H{x.end}" stroke="#cccccc"/>',
            f'<text x="{x.start - 6}" y="{place + 4:.1f}" text-anchor="end">{10.0**decade:g}</text>',
        ]
    return [*elements, f'<path d="M{x.start},{y.end} V{y.start} H{x.end}" fill="none" stroke="#888888"/>']


def _panel(panel: LogPanel) -> list[str]:
    values = [value for points in panel.lines.values() for _, value in points]
    x = _Axis(min(panel.ticks), max(panel.ticks), LEFT, WIDTH - RIGHT)
    y = _Axis(*_decades(values), HEIGHT - BOTTOM, TOP)
    elements = _axes(panel, x, y)
    ends = spread_labels([y.place(points[-1][1]) for points in panel.lines.values()], 14)
    for (name, points), end, colour in zip(panel.lines.items(), ends, COLOURS, strict=False):
        path = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in points)
        elements.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        elements += [
            f'<circle cx="{x.place(a):.1f}" cy="{y.place(b):.1f}" r="2.6" fill="{colour}"/>' for a, b in points
        ]
        elements.append(f'<text x="{x.end + 8}" y="{end + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    return elements


def chart(panels: Sequence[LogPanel]) -> str:
    """Draw panels in one row as SVG; a panel has at most as many lines as there are colours."""
    for panel in panels:
        if len(panel.lines) > len(COLOURS):
            raise ValueError(
                f"log_plot: {panel.title!r} must have at most {len(COLOURS)} lines, got {len(panel.lines)}"
            )
    width = WIDTH * len(panels)
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        elements += [f'<g transform="translate({index * WIDTH},0)">', *_panel(panel), "</g>"]
    return "\n".join([*elements, "</svg>\n"])
