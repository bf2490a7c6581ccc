"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _malloc_trim() -> Any:
    """glibc's; None with another library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Give back the pages that the C library keeps for later, of all its arenas.

    What a phase of a trace freed would otherwise stay resident beside what the next one takes: blocks of one size
    seldom fit where others were.
    """
    release = _malloc_trim()
    if release is not None:
        release(0)
