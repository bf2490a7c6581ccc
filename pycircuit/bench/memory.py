"""What this process holds in memory: now, and at most since a moment. Linux only; None elsewhere."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _bytes(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return None


def resident() -> int | None:
    return _bytes("VmRSS")


def own() -> int | None:
    """What is resident without pages of files, which the system may drop."""
    return _bytes("RssAnon")


def peak() -> int | None:
    """The most since the process started, or since `restart_peak`."""
    return _bytes("VmHWM")


def restart_peak() -> int | None:
    """Give back what the allocator keeps, count the peak from here on and return what is resident now."""
    gc.collect()
    if not _CLEAR.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    _CLEAR.write_text("5")
    return resident()
