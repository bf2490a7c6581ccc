"""Tables as HTML, for notebooks. Every text is escaped, and colours come from the surroundings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_CELL = "padding:2px 10px;text-align:"
Cell = str | int | float | None


def html_table(header: Sequence[str], rows: Iterable[Sequence[Cell]], caption: str = "") -> str:
    """Format a table: numbers to the right with four significant digits, None as a dash, the caption above."""
    body = [list(row) for row in rows]
    numeric = [
        all(isinstance(row[i], int | float | None) for row in body) and any(row[i] is not None for row in body)
        for i in range(len(header))
    ]
    sides = ["right" if number else "left" for number in numeric]
    lines = [f'<th style="{_CELL}{side}">{escape(text)}</th>' for text, side in zip(header, sides, strict=True)]
    above = f'<caption style="text-align:left;white-space:pre-wrap">{escape(caption)}</caption>' if caption else ""
    out = [f'<table class="pycircuit">{above}<thead><tr>{"".join(lines)}</tr></thead><tbody>']
    for row in body:
        cells = zip(row, sides, strict=True)
        out.append("<tr>" + "".join(f'<td style="{_CELL}{side}">{escape(_text(cell))}</td>' for cell, side in cells))
        out[-1] += "</tr>"
    return "\n".join([*out, "</tbody></table>"])


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
