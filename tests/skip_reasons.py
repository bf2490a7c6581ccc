"""Reasons for which a test may be skipped: facts of the machine, never unfinished work."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from pycircuit.ops.dispatch import PARTS_ISAS, native_isas

ROOT = Path(__file__).parents[1]
REASONS = {
    "needs a CUDA device": lambda: not torch.cuda.is_available(),
    "a CUDA device is here": torch.cuda.is_available,
    "triton is not installed": lambda: find_spec("triton") is None,
    "this machine runs every ISA": lambda: all(supported for _, supported in native_isas()),
    "needs AVX512_BF16": lambda: not any(supported for name, supported in native_isas() if name in PARTS_ISAS),
    "needs AMX": lambda: not dict(native_isas()).get("amx", False),
    "needs Linux": lambda: not Path("/proc/self/clear_refs").exists(),
    "nm is not installed": lambda: shutil.which("nm") is None,
    "no object files under build/": lambda: not (ROOT / "build").exists(),
}


def unexplained(skips: Sequence[tuple[str, str]]) -> list[str]:
    """Return the skips, (test, reason), whose reason is not listed above or is untrue on this machine."""
    wrong = []
    for test, reason in skips:
        conditions = [condition for start, condition in REASONS.items() if reason.startswith(start)]
        if not conditions or not conditions[0]():
            wrong.append(f"{test}: {reason}")
    return wrong
