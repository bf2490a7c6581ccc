"""Output of the commands: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from rich.console import Console
from rich.table import Table


def console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal, or as the text in a pipe. stderr: if standard output is JSON."""
    out = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr) if out.isatty() else Console(stderr=stderr, width=200)


def table(*header: str) -> Table:
    """Return an empty table without a frame."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, no_wrap=i == 0)
    return table


def emit(value: Any, indent: int | None = 1) -> None:
    """Print a value as JSON, NaN and infinities as null."""
    print(json.dumps(_finite(value), indent=indent, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(entry) for entry in value]
    return value
