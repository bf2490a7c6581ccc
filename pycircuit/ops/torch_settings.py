"""Torch settings under which products are computed in the type of their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, Literal

import torch


def autocast_is_on() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn autocast off, as a context or a decorator: only tensors' own types decide the precision."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@dataclass(frozen=True)
class _MatmulSetting:
    """Precision of float32 matrix products, in torch's older interface (None: not in force) and its newer one.

    Reading the older one raises where only the newer one was used; torch before 2.9 has no newer one.
    """

    older: str | None
    newer: tuple[str, ...]

    @staticmethod
    def backends() -> list[Any]:
        known = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
        return [backend for backend in known if hasattr(backend, "fp32_precision")]

    @classmethod
    def current(cls) -> _MatmulSetting:
        try:
            older = torch.get_float32_matmul_precision()
        except RuntimeError:
            older = None
        return cls(older, tuple(backend.fp32_precision for backend in cls.backends()))

    def changed(self, precision: Literal["highest", "high"]) -> _MatmulSetting:
        """Setting with float32 products in float32 ("highest") or tf32 ("high"), by the interface in force."""
        if self.older == precision:
            return self
        newer = "ieee" if precision == "highest" else "tf32"
        return _MatmulSetting(None if self.older is None else precision, (newer,) * len(self.newer))

    def apply(self) -> None:
        if self.older is not None:
            torch.set_float32_matmul_precision(self.older)
        for backend, precision in zip(self.backends(), self.newer, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = "none"  # torch's general setting, if that is the one
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


_lock = RLock()  # the setting is the process's, and traces may run in several threads
_outer: list[_MatmulSetting] = []  # before every trace under way; the first is the process's own


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 matrices in float32, as a context or a decorator."""
    with _lock:
        before = _MatmulSetting.current()
        _outer.append(before)
        if (wanted := before.changed("highest")) != before:
            wanted.apply()
    try:
        yield
    finally:
        with _lock:
            first = _outer[0]
            _outer.pop()
            if not _outer and first.changed("highest") != first:
                first.apply()


@contextmanager
def tf32_products() -> Iterator[None]:
    """Compute products of float32 matrices in tf32 on a GPU; other threads that enter or leave a trace wait."""
    with _lock:
        before = _MatmulSetting.current()
        wanted = before.changed("high")
        if wanted == before:
            yield
            return
        wanted.apply()
        try:
            yield
        finally:
            before.apply()
