"""Reasons for which a test may be skipped: something the machine lacks or has, never something we have not done."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from pycircuit.ops.dispatch import native_isas

ROOT = Path(__file__).parents[1]
REASONS = {
    "needs a CUDA device": lambda: not torch.cuda.is_available(),
    "a CUDA device is here": torch.cuda.is_available,
    "triton is not installed": lambda: find_spec("triton") is None,
    "this machine runs every ISA": lambda: all(supported for _, supported in native_isas()),
    "needs Linux": lambda: not Path("/proc/self/clear_refs").exists(),
    "nm is not installed": lambda: shutil.which("nm") is None,
    "no object files under build/": lambda: not (ROOT / "build").exists(),
}


def unexplained(skips: Sequence[tuple[str, str]]) -> list[str]:
    """The skips, each a test and its reason, that are for no reason above or for one that is untrue of this machine."""
    wrong = []
    for test, reason in skips:
        true = [holds for start, holds in REASONS.items() if reason.startswith(start)]
        if not true or not true[0]():
            wrong.append(f"{test}: {reason}")
    return wrong
