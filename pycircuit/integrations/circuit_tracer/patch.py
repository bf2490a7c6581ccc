"""Functions of circuit-tracer's replaced inside a running program, and put back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import RLock
from types import ModuleType, TracebackType
from typing import Any

from .attribution import attribute
from .generations import generation, has_module, library


@dataclass(frozen=True)
class Replacement:
    """A function of circuit-tracer's, by its module within the package and its name, and ours in its place."""

    module: str
    name: str
    ours: Callable[..., Any]


# A module that a circuit-tracer does not have is left out.
REPLACEMENTS: list[Replacement] = [
    Replacement("attribution.attribute", "attribute", attribute),
    Replacement("attribution.attribute_transformerlens", "attribute", attribute),
    Replacement("attribution.attribute_nnsight", "attribute", attribute),
]


class _Patch:
    """What is replaced, by what, and how many ask for it."""

    def __init__(self) -> None:
        self.lock, self.count = RLock(), 0
        self.pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = []  # circuit-tracer's own and ours

    def enter(self) -> None:
        originals = _originals()
        with self.lock:
            if not self.count:
                self.pairs = [(theirs, _stands_for(theirs, ours)) for theirs, ours in originals]
            self.count += 1
            _rebind(self.pairs)  # modules imported since the last time are found again

    def leave(self) -> None:
        with self.lock:
            self.count -= 1
            if not self.count:
                _rebind([(ours, theirs) for theirs, ours in self.pairs])
                self.pairs = []


_patch = _Patch()


def _originals() -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    """The functions of this circuit-tracer that are to be replaced, and ours."""
    generation("accelerate")
    present = [row for row in REPLACEMENTS if has_module(row.module)]
    return [(getattr(library(row.module), row.name), row.ours) for row in present]


def _stands_for(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, so that those who import ours by name keep it when theirs comes back."""

    @functools.wraps(original)
    def accelerated(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return accelerated


def _rebind(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Bind every name of every module that is bound to the first of a pair to the second."""
    wanted = {id(present): replacement for present, replacement in pairs}
    names_of = vars(ModuleType)["__dict__"].__get__  # a lazy module's own would import all it has
    for module in list(sys.modules.values()):
        if issubclass(type(module), ModuleType):
            names = names_of(module)
            for name, value in list(names.items()):
                if id(value) in wanted:
                    names[name] = wanted[id(value)]


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
