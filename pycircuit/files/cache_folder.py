"""The cache folder: files that are made out of others once and kept."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .atomic import write_atomically
from .locks import exclusive


def cache_folder() -> Path:
    """$PYCIRCUIT_CACHE, or pycircuit in the user's cache."""
    configured = os.environ.get("PYCIRCUIT_CACHE")
    if configured:
        return Path(configured)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pycircuit"
    except RuntimeError:  # a user of no name, as in a container
        raise FileNotFoundError(
            "load: a folder must be known for what is converted once, got no home; set PYCIRCUIT_CACHE"
        ) from None


def cached_file(kind: str, sources: list[Path], details: str, size: int, write: Callable[[BinaryIO], object]) -> Path:
    """The cache's file that `write` makes out of `sources`: complete or absent, and made anew after they change.

    One of all threads and processes that want it makes it, while the others wait. details: tell files of the same
    sources apart. size: its bytes, roughly.
    """
    states = [(str(source.resolve()), source.stat()) for source in sources]
    text = " ".join(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states) + details
    path = cache_folder() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        return path
    try:
        _make(path, size, write)
    except OSError as error:
        if str(error).startswith("load:"):
            raise
        raise type(error)(
            f"load: {sources[0]} must be converted once into a file of {size} bytes in {path.parent}, got "
            f"{error.strerror or error}; set PYCIRCUIT_CACHE to a folder that can take it"
        ) from None
    return path


def _make(path: Path, size: int, write: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with exclusive(lock):
        try:
            if path.is_file():
                return
            if shutil.disk_usage(path.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_atomically(path, write)
        finally:
            lock.unlink(missing_ok=True)
