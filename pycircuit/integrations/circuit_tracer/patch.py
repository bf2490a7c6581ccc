"""Replacement of circuit-tracer's functions inside a running program, and their restoration."""

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
from .graph_files import create_graph_files
from .graphs import compute_graph_scores, compute_node_influence, prune_graph


@dataclass(frozen=True)
class Replacement:
    """A function of circuit-tracer, by its module within the package and its name, and pycircuit's in its place."""

    module: str
    name: str
    ours: Callable[..., Any]


# Modules that the installed circuit-tracer does not have are skipped.
REPLACEMENTS: list[Replacement] = [
    Replacement("attribution.attribute", "attribute", attribute),
    Replacement("attribution.attribute_transformerlens", "attribute", attribute),
    Replacement("attribution.attribute_nnsight", "attribute", attribute),
    Replacement("graph", "compute_node_influence", compute_node_influence),
    Replacement("graph", "prune_graph", prune_graph),
    Replacement("graph", "compute_graph_scores", compute_graph_scores),
    Replacement("utils.create_graph_files", "create_graph_files", create_graph_files),
]


class _PatchState:
    """The replaced functions, and the number of handles that are active."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.count = 0
        self.pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = []  # circuit-tracer's own and ours

    def enter(self) -> None:
        originals = _originals()
        with self.lock:
            if not self.count:
                self.pairs = [(theirs, _wrapper(theirs, ours)) for theirs, ours in originals]
            self.count += 1
            _rebind(self.pairs)  # again, for modules imported since the last time

    def leave(self) -> None:
        with self.lock:
            self.count -= 1
            if not self.count:
                _rebind([(ours, theirs) for theirs, ours in self.pairs])
                self.pairs = []


_patch = _PatchState()


def _originals() -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Pairs of the installed circuit-tracer's functions and pycircuit's."""
    generation("accelerate")
    present = [replacement for replacement in REPLACEMENTS if has_module(replacement.module)]
    return [(getattr(library(replacement.module), replacement.name), replacement.ours) for replacement in present]


def _wrapper(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap pycircuit's function, so that names bound to the function itself stay bound to it at the restoration."""

    @functools.wraps(original)
    def accelerated(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return accelerated


def _rebind(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Rebind every name of every module from the first function of a pair to the second."""
    replacements = {id(present): replacement for present, replacement in pairs}
    names_of = vars(ModuleType)["__dict__"].__get__  # a lazy module's own __dict__ would import all its submodules
    for module in list(sys.modules.values()):
        if issubclass(type(module), ModuleType):
            names = names_of(module)
            for name, value in list(names.items()):
                if id(value) in replacements:
                    names[name] = replacements[id(value)]


class Accelerated:
    """Handle: circuit-tracer's names are bound to pycircuit's until `restore` or the end of a `with` block."""

    def __init__(self) -> None:
        _patch.enter()
        self.active = True
        self.blocks = 0

    def restore(self) -> None:
        """End this handle; the last handle restores circuit-tracer's functions. A second call does nothing."""
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
    """Replace circuit_tracer.attribute, under every name it was imported by, with pycircuit's.

    Also prune_graph, compute_graph_scores, compute_node_influence and create_graph_files.

    with accelerate(): ...     # or:    handle = accelerate(); ...; handle.restore()

    May be nested and repeated: the last `restore` restores circuit-tracer's functions. References outside modules,
    such as in a list, a class or a default argument, are not replaced.
    """
    return Accelerated()
