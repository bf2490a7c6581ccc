"""The figure of docs/truth.md: correlation by what is held, and missed effects against errors, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 300, 52, 14, 40, 66
COLOURS = ("#1b6ca8", "#d1495b", "#777777", "#2e8b57", "#8a5fbf")
FREEZES = {"attention": "patterns and norms", "patterns": "patterns", "none": "nothing"}
MOST_MISSED = 2.0


def figure(documents: Sequence[Mapping[str, Any]]) -> str:
    """Draw two panels for each model, a row each, as SVG."""
    width, height = 2 * WIDTH, HEIGHT * len(documents)
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for row, document in enumerate(documents):
        for column, draw in enumerate((_correlations, _errors)):
            elements += [f'<g transform="translate({column * WIDTH},{row * HEIGHT})">', *draw(document), "</g>"]
    return "\n".join([*elements, "</svg>\n"])


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)


def _frame(title: str, low: float, high: float, ticks: Sequence[float], label: str) -> list[str]:
    elements = [
        f'<text x="{WIDTH / 2}" y="18" text-anchor="middle" font-weight="bold">{escape(title)}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - BOTTOM + 32}" text-anchor="middle">{escape(label)}</text>',
    ]
    for tick in ticks:
        y = _y(tick, low, high)
        elements += [
            f'<path d="M{LEFT},{y:.1f} H{WIDTH - RIGHT}" stroke="#e0e0e0"/>',
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>',
        ]
    return elements


def _legend(names: Sequence[str]) -> list[str]:
    elements, x = [], float(LEFT)
    for name, colour in zip(names, COLOURS, strict=False):
        elements += [
            f'<circle cx="{x + 4}" cy="{HEIGHT - 14}" r="4" fill="{colour}"/>',
            f'<text x="{x + 12}" y="{HEIGHT - 10}">{escape(name)}</text>',
        ]
        x += 24 + 6.5 * len(name)
    return elements


def _correlations(document: Mapping[str, Any]) -> list[str]:
    """Correlation of ablated supernodes' effects: a filled circle by the graph, a ring by the replacement model."""
    title = f"{document['model']}: ablated supernodes, predicted and measured"
    elements = _frame(title, -0.25, 1.0, (0, 0.25, 0.5, 0.75, 1), "held; filled: graph, ring: replacement model")
    names, slot = list(document["sets"]), (WIDTH - LEFT - RIGHT) / len(FREEZES)
    for i, (freeze, label) in enumerate(FREEZES.items()):
        centre = LEFT + slot * (i + 0.5)
        text = f'<text x="{centre:.0f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>'
        elements.append(text)
        for j, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
            for e in document["sets"][name]["effects"]:
                if (e["kind"], e["freeze"], e["factor"]) == ("supernode", freeze, 0.0):
                    x = centre + slot * 0.2 * (j - (len(names) - 1) / 2)
                    elements += _whisker(x, e["answer"]["graph"], colour, colour)
                    elements += _whisker(x + 6, e["answer"]["replacement"], colour, "white")
    return elements + _legend(names)


def _whisker(x: float, figures: Mapping[str, Any], colour: str, fill: str) -> list[str]:
    values = figures.get("correlation")
    if not values or None in values:
        return []
    y, low, high = (_y(max(-0.25, v), -0.25, 1.0) for v in values)
    return [
        f'<path d="M{x:.1f},{low:.1f} V{high:.1f}" stroke="{colour}"/>',
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{fill}" stroke="{colour}"/>',
    ]


def _errors(document: Mapping[str, Any]) -> list[str]:
    """Error share of each prompt's graph against the share of effects that it misses, patterns and norms held."""
    title = f"{document['model']}: share of effects that a graph misses"
    elements = _frame(title, 0, MOST_MISSED, (0, 0.5, 1, 1.5, 2), "error share of the graph; patterns and norms held")
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = LEFT + (WIDTH - LEFT - RIGHT) * tick
        elements.append(f'<text x="{x:.0f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    sets = document["errors"]["by set"]
    for colour, relation in zip(COLOURS, sets.values(), strict=False):
        for share, missed, _ in relation["points"]:
            if missed is None:
                continue
            x, y = LEFT + (WIDTH - LEFT - RIGHT) * share, _y(min(MOST_MISSED, missed), 0, MOST_MISSED)
            elements.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}" fill-opacity="0.6"/>')
    return elements + _legend(list(sets))
