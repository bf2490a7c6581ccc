"""Where things that were converted once are kept."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pycircuit.files.locks import exclusive


def cache_folder() -> Path:
    """$PYCIRCUIT_CACHE, or pycircuit in the user's cache."""
    given = os.environ.get("PYCIRCUIT_CACHE")
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pycircuit"
    except RuntimeError:  # a user of no name, as in a container
        raise FileNotFoundError(
            "load: a folder must be known for what is converted once, got no home; set PYCIRCUIT_CACHE"
        ) from None


def made_once(kind: str, sources: list[Path], about: str, size: int, write: Callable[[Path], None]) -> Path:
    """The file of the cache that `write` makes out of `sources`: there whole or not at all, and made anew after
    changes; by one of all threads and processes that want it, while the others wait.

    about: what of the sources it is. size: its bytes, roughly.
    """
    states = [(str(source.resolve()), source.stat()) for source in sources]
    text = " ".join(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states) + about
    kept = cache_folder() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if kept.is_file():
        return kept
    try:
        _make(kept, size, write)
    except OSError as error:
        if str(error).startswith("load:"):
            raise
        raise type(error)(
            f"load: {sources[0]} must be converted once into a file of {size} bytes in {kept.parent}, got "
            f"{error.strerror or error}; set PYCIRCUIT_CACHE to a folder that can take it"
        ) from None
    return kept


def _make(kept: Path, size: int, write: Callable[[Path], None]) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    fresh = kept.with_name(f".{kept.name}.partial")
    with exclusive(fresh):
        try:
            if kept.is_file():
                return
            if shutil.disk_usage(kept.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(fresh)
            fresh.replace(kept)
        finally:
            fresh.unlink(missing_ok=True)
