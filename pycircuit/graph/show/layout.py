"""Layout of a picture: coordinates of its boxes and curves, without SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from unicodedata import combining, east_asian_width

import numpy as np

LEFT, TOP = 64, 16  # pixels for the names of rows, and above the first
GAP, MARGIN, STEP, RIGHT = 6, 7, 36, 18  # between boxes, inside them, between rows, right of a column
WIDEST = 1600  # pixels of a picture
TOKENS, ERRORS = -2, -1  # rows below the layers
_SIDEWAYS = (0, 14, -14, 28, -28, 48, -48, 80, -80, 120, -120)  # pixels by which candidate curves bend sideways
_CURVE_TIMES = np.linspace(0.03, 0.97, 24)  # parameters of the points tested on a curve


@dataclass
class Box:
    """Nodes drawn as one box; a gap stands for columns left out.

    row: TOKENS, ERRORS, a layer, or the number of layers for targets; x, y: upper left.
    """

    nodes: list[int]
    kind: str
    text: str
    title: str
    row: int
    column: int
    influence: float
    automatic: bool = False  # its label
    full_text: str = ""  # before it was shortened
    inputs: dict[int, float] = field(default_factory=dict)  # weights from other boxes
    x: float = 0
    y: float = 0

    @property
    def size(self) -> int:
        """Font size."""
        return 10 if self.kind == "error" else 12

    @property
    def height(self) -> int:
        return 16 if self.kind == "error" else 24

    @property
    def width(self) -> float:
        return measure(self.text, self.size) + (0 if self.kind == "gap" else 2 * MARGIN)


class Layout(NamedTuple):
    """Size of the picture without its legend; columns: (left, right) of each; rows: (row, its middle)."""

    width: float
    height: float
    columns: list[tuple[float, float]]
    rows: list[tuple[int, float]]


class Curve(NamedTuple):
    """A curve from a box to a box; points: the four of a cubic, x and y each."""

    source: int
    target: int
    points: tuple[tuple[float, float], ...]


def measure(text: str, size: float) -> float:
    """Estimate the width of a text in pixels, in any common sans-serif, rather too high than too low."""
    return size * sum(_letter_width(c) for c in text)


def _letter_width(c: str) -> float:
    if combining(c):
        return 0.0
    if east_asian_width(c) in "WF":
        return 1.05
    if c in "mwMW@%—…×":
        return 0.98
    return 0.36 if c in "ijl.,:;'|! " else 0.74 if c.isupper() else 0.64


def shorten(text: str, size: float, limit: float) -> str:
    """Shorten a text to `limit` pixels, with an ellipsis if it was longer."""
    if measure(text, size) <= limit:
        return text
    end = 0
    width = measure("…", size)
    for i, letter in enumerate(text):
        width += measure(letter, size)
        if width > limit:
            break
        end = i + 1
    return text[:end].rstrip() + "…"


def lay_out(boxes: Sequence[Box], widest: float = 240) -> Layout:
    """Set x and y of every box, the highest row on top. widest: pixels of several boxes beside each other."""
    cells: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        cells.setdefault((box.row, box.column), []).append(box)
    lines = {cell: _lines(cell_boxes, widest) for cell, cell_boxes in cells.items()}
    spans: dict[int, tuple[float, float]] = {}
    x = float(LEFT)
    for column in sorted({box.column for box in boxes}):
        column_lines = (line for (_, c), cell_lines in lines.items() if c == column for line in cell_lines)
        column_width = max(map(_line_width, column_lines))
        spans[column] = (x, x + column_width)
        x += column_width + RIGHT
    rows: list[tuple[int, float]] = []
    y = float(TOP)
    for row in sorted({box.row for box in boxes}, reverse=True):
        row_lines = {column: cell_lines for (r, column), cell_lines in lines.items() if r == row}
        row_height = max(map(_lines_height, row_lines.values()))
        for column, cell_lines in row_lines.items():
            _place_lines(cell_lines, spans[column], y + (row_height - _lines_height(cell_lines)) / 2)
        rows.append((row, y + row_height / 2))
        y += row_height + STEP
    gaps = {box.column for box in boxes if box.kind == "gap"}
    return Layout(x, y - STEP + TOP, [span for column, span in spans.items() if column not in gaps], rows)


def _lines(cell: Iterable[Box], widest: float) -> list[list[Box]]:
    """Break the boxes of a cell into lines no wider than `widest`, the most influential first."""
    lines: list[list[Box]] = []
    for box in sorted(cell, key=lambda box: (-box.influence, box.nodes)):
        if not lines or _line_width([*lines[-1], box]) > widest:
            lines.append([])
        lines[-1].append(box)
    return lines


def _line_width(line: Sequence[Box]) -> float:
    return sum(box.width for box in line) + GAP * (len(line) - 1)


def _lines_height(lines: Sequence[Sequence[Box]]) -> float:
    return sum(max(box.height for box in line) + GAP for line in lines) - GAP


def _place_lines(lines: Sequence[Sequence[Box]], span: tuple[float, float], y: float) -> None:
    for line in lines:
        x = (span[0] + span[1] - _line_width(line)) / 2
        line_height = max(box.height for box in line)
        for box in line:
            box.x, box.y = x, y + (line_height - box.height) / 2
            x += box.width + GAP
        y += line_height + GAP


def route(boxes: Sequence[Box], width: float) -> list[Curve]:
    """A curve for every input of every box: the candidate that runs behind the fewest other boxes."""
    links = [(source, target) for target, box in enumerate(boxes) for source in box.inputs]
    leave = _ports(boxes, links, 0)
    enter = _ports(boxes, links, 1)
    sides = np.array([(b.x - 3, b.x + b.width + 3, b.y - 3, b.y + b.height + 3) for b in boxes]).reshape(-1, 4)
    out = []
    for link in links:
        source, target = boxes[link[0]], boxes[link[1]]
        # Groups span layers, so an input may be beside or above its box. Curves go up, else over the top, else down.
        rises, falls = source.y >= target.y + target.height, source.y + source.height <= target.y
        start = (leave[link], source.y + source.height if falls else source.y)
        end = (enter[link], target.y + target.height if rises else target.y)
        bend = max(20.0, 0.42 * abs(start[1] - end[1]))
        out_y, in_y = start[1] + bend * (1 if falls else -1), end[1] + bend * (1 if rises else -1)
        candidates = [(start, (start[0] + shift, out_y), (end[0] + shift, in_y), end) for shift in _SIDEWAYS]
        crossed = _crossings(np.array(candidates), np.delete(sides, link, axis=0), width)
        out.append(Curve(*link, candidates[int(crossed.argmin())]))
    return out


def _ports(boxes: Sequence[Box], links: Sequence[tuple[int, int]], end: int) -> dict[tuple[int, int], float]:
    """X coordinate of each link at its box at this end: beside each other, in the order of the other ends."""
    touching: dict[int, list[tuple[int, int]]] = {}
    for link in links:
        touching.setdefault(link[end], []).append(link)
    out = {}
    for box_index, box_links in touching.items():
        box_links.sort(key=lambda link: (boxes[link[1 - end]].x + boxes[link[1 - end]].width / 2, link))
        box = boxes[box_index]
        for i, link in enumerate(box_links):
            out[link] = box.x + box.width * (0.2 + 0.6 * (i + 0.5) / len(box_links))
    return out


def _crossings(curves: np.ndarray, sides: np.ndarray, width: float) -> np.ndarray:
    """Number of points of each cubic, [curves, 4, 2], inside a box, [boxes, 4], or outside the picture: [curves]."""
    t = _CURVE_TIMES[:, None]
    weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    points = np.einsum("tk,wkc->wtc", weights, curves)
    x, y = points[..., 0, None], points[..., 1, None]
    inside = (x > sides[:, 0]) & (x < sides[:, 1]) & (y > sides[:, 2]) & (y < sides[:, 3])
    outside = (points[..., 0] < LEFT - 12) | (points[..., 0] > width - 4)
    return np.asarray(inside.sum((1, 2)) + outside.sum(1))
