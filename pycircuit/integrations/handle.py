"""Methods of one object replaced and put back, and weights as they lie there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor


class Accelerated:
    """`target` runs these functions in place of its methods until `undo()`, or the end of a `with`.

    A deep copy of the target runs them too, for good; a pickled one runs its own.
    torch.compile leaves them as they are.
    """

    def __init__(
        self, target: Any, methods: Mapping[str, Callable[..., Any]], also: Callable[[], Any] = lambda: None
    ) -> None:
        """also: what `undo` calls beside."""
        changed = [name for name in methods if not _own(target, name)]
        if changed:
            raise ValueError(
                f"accelerate: {type(target).__name__} must have its own {changed[0]}, got one that was replaced; "
                "undo() that first"
            )
        self._target, self._also = target, also
        # What a compiler would trace is the checks of arguments, not the kernels.
        self._methods = {name: MethodType(torch.compiler.disable(f), target) for name, f in methods.items()}
        for name, method in self._methods.items():
            setattr(target, name, method)

    def undo(self) -> None:
        """The target's own methods again; nothing where they are back already."""
        held = vars(self._target)
        changed = [name for name, method in self._methods.items() if held.get(name) is not method]
        if changed:
            raise ValueError(
                f"undo: {type(self._target).__name__} must still have the {changed[0]} it was given, got one that was "
                "replaced since; put that back first"
            )
        methods, self._methods = self._methods, {}
        for name in methods:
            delattr(self._target, name)
        if methods:
            self._also()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _own(target: Any, name: str) -> bool:
    """Whether a method is that of the class; one that was unpickled may hold it, bound."""
    held = vars(target)
    return name not in held or getattr(held[name], "__func__", None) is getattr(type(target), name)


def rows_together(weight: Tensor) -> Tensor:
    """[rows, width] as ops take it; a copy of weights that were loaded as the transpose of what lies in a file."""
    return weight if weight.stride(-1) == 1 else weight.contiguous()
