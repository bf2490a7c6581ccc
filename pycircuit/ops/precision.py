"""Sums in the type of their tensors, whatever the caller asks of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def autocast_is_on() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """As a decorator, too: half precision is a model's or a transcoder's own type, never the surroundings'."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
