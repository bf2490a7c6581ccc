"""Sums in the type of their tensors, whatever the caller asks of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def autocast_is_on() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _matmul_settings() -> list[Any]:
    """torch's settings of float32 products by device, where this torch has one for each."""
    settings = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [s for s in settings if hasattr(s, "fp32_precision")]


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products of float32 numbers, not tf32 or bfloat16; the user's own settings are back afterwards.

    torch has two ways to ask for less, and reading one raises where the other was used: it is never read here.
    """
    settings = _matmul_settings()
    if not settings:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    lowered = [(s, s.fp32_precision) for s in settings if s.fp32_precision not in ("none", "ieee")]
    for setting, _ in lowered:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, word in lowered:
            setting.fp32_precision = "none"  # as it was if that is enough: then it is torch's general setting
            if setting.fp32_precision != word:
                setting.fp32_precision = word


@contextmanager
def without_autocast() -> Iterator[None]:
    """As a decorator, too: half precision is a model's or a transcoder's own type, never the surroundings'."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
