"""The lock of a model: one forward of ours at a time, through whatever object holds the model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from threading import RLock
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn


class Lock(AbstractContextManager[bool], Protocol):
    """A reentrant lock, as `threading.RLock()` makes one."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
    def release(self) -> None: ...


_LOCKS: WeakKeyDictionary[nn.Module, Lock] = WeakKeyDictionary()


def forward_lock(model: nn.Module) -> Lock:
    """Return the reentrant lock of a model, to be held while it runs for us."""
    return _LOCKS.setdefault(model, RLock())
