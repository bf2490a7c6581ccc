"""Values of a request's query, checked."""

from __future__ import annotations

from collections.abc import Mapping

LONGEST_TEXT = 1000


def text(query: Mapping[str, str], name: str, default: str | None = None) -> str:
    """Return a text of the query."""
    value = query.get(name, default)
    if value is None or len(value) > LONGEST_TEXT:
        got = "none" if value is None else f"{len(value)} characters"
        raise ValueError(f"page: {name} must be a text of at most {LONGEST_TEXT} characters, got {got}")
    return value


def fraction(query: Mapping[str, str], name: str, default: float) -> float:
    """Return a number from 0 to 1 of the query."""
    raw = text(query, name, str(default))
    try:
        value = float(raw)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"page: {name} must be a number from 0 to 1, got {raw[:40]!r}")
    return value


def integer(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    """Return a whole number of the query within bounds."""
    raw = text(query, name, str(default))
    value = int(raw) if raw.isascii() and raw.isdecimal() and len(raw) < 10 else least - 1
    if not least <= value <= most:
        raise ValueError(f"page: {name} must be a whole number from {least} to {most}, got {raw[:40]!r}")
    return value
