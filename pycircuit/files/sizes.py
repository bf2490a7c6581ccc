"""Sizes in bytes as people write them: "8GiB", "500 MB", 1024."""

from __future__ import annotations

import re
from numbers import Integral

_UNITS = {"": 1, "b": 1}
_UNITS.update((p + s, n**e) for s, n in (("", 1000), ("b", 1000), ("ib", 1024)) for e, p in enumerate("kmgt", 1))
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: object, name: str = "size", least: int = 1) -> int:
    """Return the bytes of "8GiB", "500 MB" or a number. name: of the argument, for errors."""
    size = None
    if isinstance(value, Integral) and not isinstance(value, bool):
        size = int(value)
    elif isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = None if match is None else _UNITS.get(match[2].lower())
        size = None if match is None or unit is None else int(float(match[1]) * unit)
    if size is None or size < least:
        raise ValueError(f"{name} must be bytes or a size such as '8GiB' or '500MB', got {value!r}")
    return size
