"""Memory of this process, resident and peak. Linux only; None elsewhere."""

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
    """Resident bytes without pages of files, which the system may drop."""
    return _bytes("RssAnon")


def peak() -> int | None:
    """Most resident bytes since the process started, or since `restart_peak`."""
    return _bytes("VmHWM")


def restart_peak() -> int | None:
    """Return free memory to the system, restart the count of the peak and return the resident bytes."""
    gc.collect()
    if not _CLEAR.exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    _CLEAR.write_text("5")
    return resident()
