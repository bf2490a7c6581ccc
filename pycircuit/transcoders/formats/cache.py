"""Where things that were converted once are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$PYCIRCUIT_CACHE, or pycircuit in the user's cache."""
    given = os.environ.get("PYCIRCUIT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pycircuit"
