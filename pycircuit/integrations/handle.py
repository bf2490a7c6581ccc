"""Handle that replaces methods of one object until it is undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor


class Accelerated:
    """Replacement of methods of `target` by functions until `undo()`, or the end of a `with`.

    A deep copy of the target keeps the functions for good; a pickled one has its own methods. torch.compile does not
    compile the functions.
    """

    def __init__(
        self, target: Any, methods: Mapping[str, Callable[..., Any]], after_undo: Callable[[], Any] = lambda: None
    ) -> None:
        """Replace the methods. after_undo: called by `undo`."""
        changed = [name for name in methods if not _is_own_method(target, name)]
        if changed:
            raise ValueError(
                f"accelerate: {type(target).__name__} must have its own {changed[0]}, got one that was replaced; "
                "undo() that first"
            )
        self._target, self._after_undo = target, after_undo
        # A compiler would trace only the checks of arguments, not the kernels.
        self._methods = {name: MethodType(torch.compiler.disable(f), target) for name, f in methods.items()}
        for name, method in self._methods.items():
            setattr(target, name, method)

    def undo(self) -> None:
        """Restore the target's own methods; a second call does nothing."""
        attributes = vars(self._target)
        changed = [name for name, method in self._methods.items() if attributes.get(name) is not method]
        if changed:
            raise ValueError(
                f"undo: {type(self._target).__name__} must still have the {changed[0]} it was given, got one that was "
                "replaced since; put that back first"
            )
        methods, self._methods = self._methods, {}
        for name in methods:
            delattr(self._target, name)
        if methods:
            self._after_undo()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _is_own_method(target: Any, name: str) -> bool:
    """True if a method is that of the class; an unpickled object may have it bound among its attributes."""
    attributes = vars(target)
    return name not in attributes or getattr(attributes[name], "__func__", None) is getattr(type(target), name)


def rows_together(weight: Tensor) -> Tensor:
    """Weight [rows, width] with contiguous rows, as ops need it; a copy of transposed weights."""
    return weight if weight.stride(-1) == 1 else weight.contiguous()
