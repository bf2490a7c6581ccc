"""Where things that were converted once are kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """$PYCIRCUIT_CACHE, or pycircuit in the user's cache."""
    given = os.environ.get("PYCIRCUIT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pycircuit"


def made_once(kind: str, source: Path, about: str, write: Callable[[Path], None]) -> Path:
    """The file of the cache that `write` makes out of `source`: there whole or not at all, and made anew after changes.

    about: what of the source it is.
    """
    state = source.stat()
    text = f"{source.resolve()} {state.st_size} {state.st_mtime_ns}{about}"
    kept = cache_folder() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_name(f".{kept.name}.{os.getpid()}.partial")
        try:
            write(fresh)
            fresh.replace(kept)
        finally:
            fresh.unlink(missing_ok=True)
    return kept
