"""Limits on the number of threads: a process that asks for more than the system can start ends without a message."""

from __future__ import annotations

import os

import torch

_PER_CORE = 16
_ALWAYS = 256  # any system starts as many


def most_threads() -> int:
    return max(_ALWAYS, _PER_CORE * (os.cpu_count() or 1))


def check_threads(op: str, name: str, count: int) -> int:
    """Require a number of threads that this machine can start."""
    if not 1 <= count <= most_threads():
        raise ValueError(
            f"{op}: {name} must be from 1 to {most_threads()} ({_PER_CORE} for each core, or {_ALWAYS}), got {count}; "
            f"more than the {os.cpu_count() or 1} cores there are gain nothing"
        )
    return count


def check_torch_threads(op: str) -> None:
    """Require that torch's number of threads, which the native ops use, can be started."""
    check_threads(op, "torch.get_num_threads()", torch.get_num_threads())
