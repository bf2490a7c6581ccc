"""Where a picture's boxes stand and its curves run: numbers only, no SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from unicodedata import combining, east_asian_width

import numpy as np

LEFT, TOP = 64, 16  # pixels for the names of rows, and above the first
GAP, MARGIN, STEP = 6, 7, 36  # between boxes, inside them, between rows
_SHIFTS = (0, 14, -14, 28, -28, 48, -48, 80, -80, 120, -120)  # sideways, pixels: the ways a curve may take
_TIMES = np.linspace(0.03, 0.97, 24)


@dataclass
class Box:
    """Nodes drawn as one. row: -1 for tokens, a layer, or the number of layers for targets; x, y: upper left."""

    nodes: list[int]
    kind: str
    text: str
    title: str
    row: int
    column: int
    influence: float
    inputs: dict[int, float] = field(default_factory=dict)  # weights from other boxes
    x: float = 0
    y: float = 0

    @property
    def size(self) -> int:
        """Of the letters."""
        return 10 if self.kind == "error" else 12

    @property
    def height(self) -> int:
        return 16 if self.kind == "error" else 24

    @property
    def width(self) -> float:
        return measure(self.text, self.size) + 2 * MARGIN


class Place(NamedTuple):
    """The whole picture's size without the legend; columns: (left, right) of each; rows: (row, its middle)."""

    width: float
    height: float
    columns: list[tuple[float, float]]
    rows: list[tuple[int, float]]


class Curve(NamedTuple):
    """From a box to a box; points: the four of a cubic, x and y each."""

    source: int
    target: int
    points: tuple[tuple[float, float], ...]


def measure(text: str, size: float) -> float:
    """About how many pixels a text takes in any common sans-serif, rather too many than too few."""
    return size * sum(_letter(c) for c in text)


def _letter(c: str) -> float:
    if combining(c):
        return 0.0
    if east_asian_width(c) in "WF":
        return 1.05
    if c in "mwMW@%—…×":
        return 0.98
    return 0.36 if c in "ijl.,:;'|! " else 0.74 if c.isupper() else 0.64


def shorten(text: str, size: float, most: float) -> str:
    """The text, or as much of it as fits into `most` pixels, and an ellipsis."""
    if measure(text, size) <= most:
        return text
    end, width = 0, measure("…", size)
    for i, letter in enumerate(text):
        width += measure(letter, size)
        if width > most:
            break
        end = i + 1
    return text[:end].rstrip() + "…"


def place(boxes: Sequence[Box], top: int) -> Place:
    """Give every box its x and y. top: the row of the targets, which stand above all others."""
    columns = sorted({box.column for box in boxes})
    widest = 240 if len(columns) <= 10 else 140 if len(columns) <= 24 else 60
    cells: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        cells.setdefault((box.row, box.column), []).append(box)
    lines = {cell: _lines(held, widest) for cell, held in cells.items()}
    spans, x = {}, float(LEFT)
    for column in columns:
        wide = max(_wide(line) for (_, c), held in lines.items() if c == column for line in held)
        spans[column] = (x, x + wide)
        x += wide + (18 if len(columns) <= 24 else 10)
    rows, y = [], float(TOP)
    for row in range(top, -2, -1):
        here = {column: held for (r, column), held in lines.items() if r == row}
        if not here:
            continue
        tall = max(map(_tall, here.values()))
        for column, held in here.items():
            _stand(held, spans[column], y + (tall - _tall(held)) / 2)
        rows.append((row, y + tall / 2))
        y += tall + STEP
    return Place(x, y - STEP + TOP, list(spans.values()), rows)


def _lines(cell: Iterable[Box], widest: float) -> list[list[Box]]:
    """The most influential first; as many beside each other as `widest` holds."""
    lines: list[list[Box]] = []
    for box in sorted(cell, key=lambda box: (-box.influence, box.nodes)):
        if not lines or _wide([*lines[-1], box]) > widest:
            lines.append([])
        lines[-1].append(box)
    return lines


def _wide(line: Sequence[Box]) -> float:
    return sum(box.width for box in line) + GAP * (len(line) - 1)


def _tall(lines: Sequence[Sequence[Box]]) -> float:
    return sum(max(box.height for box in line) + GAP for line in lines) - GAP


def _stand(lines: Sequence[Sequence[Box]], span: tuple[float, float], y: float) -> None:
    for line in lines:
        x = (span[0] + span[1] - _wide(line)) / 2
        tall = max(box.height for box in line)
        for box in line:
            box.x, box.y = x, y + (tall - box.height) / 2
            x += box.width + GAP
        y += tall + GAP


def route(boxes: Sequence[Box], width: float) -> list[Curve]:
    """A curve for every input of every box, which runs behind as few other boxes as one of its ways does."""
    links = [(source, at) for at, box in enumerate(boxes) for source in box.inputs]
    leave = _ports(boxes, links, 0)
    enter = _ports(boxes, links, 1)
    sides = np.array([(b.x - 3, b.x + b.width + 3, b.y - 3, b.y + b.height + 3) for b in boxes]).reshape(-1, 4)
    out = []
    for link in links:
        source, target = boxes[link[0]], boxes[link[1]]
        # Groups span layers: what feeds one may stand beside or above it. Curves go up, else over the top, else down.
        rises, falls = source.y >= target.y + target.height, source.y + source.height <= target.y
        start = (leave[link], source.y + source.height if falls else source.y)
        end = (enter[link], target.y + target.height if rises else target.y)
        bend = max(20.0, 0.42 * abs(start[1] - end[1]))
        out_y, in_y = start[1] + bend * (1 if falls else -1), end[1] + bend * (1 if rises else -1)
        ways = [(start, (start[0] + s, out_y), (end[0] + s, in_y), end) for s in _SHIFTS]
        crossed = _crossings(np.array(ways), np.delete(sides, link, axis=0), width)
        out.append(Curve(*link, ways[int(crossed.argmin())]))
    return out


def _ports(boxes: Sequence[Box], links: Sequence[tuple[int, int]], end: int) -> dict[tuple[int, int], float]:
    """Where each link touches its box at this end: beside each other, in the order of the other ends."""
    touching: dict[int, list[tuple[int, int]]] = {}
    for link in links:
        touching.setdefault(link[end], []).append(link)
    out = {}
    for at, held in touching.items():
        held.sort(key=lambda link: (boxes[link[1 - end]].x + boxes[link[1 - end]].width / 2, link))
        box = boxes[at]
        for i, link in enumerate(held):
            out[link] = box.x + box.width * (0.2 + 0.6 * (i + 0.5) / len(held))
    return out


def _crossings(ways: np.ndarray, sides: np.ndarray, width: float) -> np.ndarray:
    """How often each cubic, [ways, 4, 2], lies in a box, [boxes, 4], or outside the picture: [ways]."""
    t = _TIMES[:, None]
    weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    points = np.einsum("tk,wkc->wtc", weights, ways)
    x, y = points[..., 0, None], points[..., 1, None]
    inside = (x > sides[:, 0]) & (x < sides[:, 1]) & (y > sides[:, 2]) & (y < sides[:, 3])
    outside = (points[..., 0] < LEFT - 12) | (points[..., 0] > width - 4)
    return np.asarray(inside.sum((1, 2)) + outside.sum(1))
