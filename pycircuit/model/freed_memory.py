"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt's names of the two settings
_SMALLEST, _LARGEST = 128 << 10, 32 << 20  # the threshold at glibc's start, and the highest that it moves to
_lock = threading.Lock()
_bounds: list[int] = []


@cache
def _libc(name: str) -> Any:
    """A function of glibc; None with another library."""
    return getattr(ctypes.CDLL(None), name, None)


def trim() -> None:
    """Give back the pages that the C library keeps for later, of all its arenas.

    Blocks that one phase of a trace freed would otherwise stay resident beside those of the next: blocks of one size
    seldom fit where others were.
    """
    release = _libc("malloc_trim")
    if release is not None:
        release(0)


@contextmanager
def released_at_once(bound: int) -> Iterator[None]:
    """Have freed blocks that are large beside `bound` bytes go back to the system as they are freed.

    glibc maps large blocks one by one, but every one that is freed raises the size from which it does, up to 32 MiB;
    later ones then lie in the heap, and the holes between them stay resident. That size becomes a small share of the
    smallest bound that a trace runs under. A threshold that the user's environment sets is left as it is.
    """
    with _lock:
        _bounds.append(bound)
        _map_from(min(_bounds) >> 8)
    try:
        yield
    finally:
        with _lock:
            _bounds.remove(bound)
            _map_from(min(_bounds) >> 8 if _bounds else _LARGEST)


def _map_from(size: int) -> None:
    """Map blocks of `size` bytes or more one by one, in place of glibc's moving threshold."""
    set_option = _libc("mallopt")
    if set_option is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    size = min(max(size, _SMALLEST), _LARGEST)
    set_option(_MMAP_THRESHOLD, size)
    set_option(_TRIM_THRESHOLD, 2 * size)
