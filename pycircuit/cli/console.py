"""What commands print: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from rich.console import Console
from rich.table import Table


def console(stderr: bool = False) -> Console:
    """As wide as the terminal; into a pipe, as wide as the text. stderr: where standard output is for machines."""
    out = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr) if out.isatty() else Console(stderr=stderr, width=200)


def table(*header: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        made.add_column(name, no_wrap=i == 0)
    return made


def emit(value: Any, indent: int | None = 1) -> None:
    """As JSON on standard output, where a number that is none is null."""
    print(json.dumps(_plain(value), indent=indent, allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value
