"""circuit-tracer's `attribute` replaced inside a running program, and put back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from threading import RLock
from types import ModuleType, TracebackType
from typing import Any

from .attribution import attribute, library


class _Patch:
    """What is replaced, by what, and how many ask for it."""

    def __init__(self) -> None:
        self.lock, self.count = RLock(), 0
        self.original: Callable[..., Any] | None = None
        self.ours: Callable[..., Any] | None = None

    def enter(self) -> None:
        module = library("attribution.attribute")
        with self.lock:
            if not self.count:
                self.original = module.attribute
                self.ours = _stands_for(module.attribute)
            self.count += 1
            _rebind(self.original, self.ours)  # modules imported since the last time are found again

    def leave(self) -> None:
        with self.lock:
            self.count -= 1
            if not self.count:
                _rebind(self.ours, self.original)
                self.original = self.ours = None


_patch = _Patch()


def _stands_for(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, so that those who import ours by name keep it when theirs comes back."""

    @functools.wraps(original)
    def accelerated(*args: Any, **kwargs: Any) -> Any:
        return attribute(*args, **kwargs)

    return accelerated


def _rebind(present: Any, wanted: Any) -> None:
    """Every name of every module that is bound to `present`."""
    names_of = vars(ModuleType)["__dict__"].__get__  # a lazy module's own would import all it has
    for module in list(sys.modules.values()):
        if issubclass(type(module), ModuleType):
            names = names_of(module)
            for name in [name for name, value in list(names.items()) if value is present]:
                names[name] = wanted


class Accelerated:
    """circuit-tracer runs by pycircuit until `restore`, or until the block of a `with` is left."""

    def __init__(self) -> None:
        _patch.enter()
        self.active, self.blocks = True, 0

    def restore(self) -> None:
        """Give circuit-tracer its own back, once all who asked for ours are done; a second call does nothing."""
        with _patch.lock:
            if self.active:
                self.active = False
                _patch.leave()

    def __enter__(self) -> Accelerated:
        if not self.active:
            raise RuntimeError("accelerate: a block must be entered before restore(), got one after; call it again")
        self.blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.blocks -= 1
        if not self.blocks:
            self.restore()


def accelerate() -> Accelerated:
    """From now on circuit_tracer.attribute, and every name it was imported by, is pycircuit's.

    with accelerate(): ...     # or:    done = accelerate(); ...; done.restore()

    May be nested and repeated: circuit-tracer's own comes back with the last `restore`. A function held elsewhere than
    in a module, as in a list, a class or a default argument, is not found.
    """
    return Accelerated()
