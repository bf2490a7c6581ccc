"""Methods of one object replaced, and put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any


class Accelerated:
    """`target` runs these functions in place of its methods until `undo()`, or the end of a `with`.

    A deep copy of the target runs them too, for good.
    """

    def __init__(
        self, target: Any, methods: Mapping[str, Callable[..., Any]], also: Callable[[], Any] = lambda: None
    ) -> None:
        """also: what `undo` calls beside."""
        changed = [name for name in methods if name in vars(target)]
        if changed:
            raise ValueError(
                f"accelerate: {type(target).__name__} must have its own {changed[0]}, got one that was replaced; "
                "undo() that first"
            )
        self._target, self._names, self._also = target, tuple(methods), also
        for name, function in methods.items():
            setattr(target, name, MethodType(function, target))

    def undo(self) -> None:
        """The target's own methods again; nothing where they are back already."""
        names, self._names = self._names, ()
        for name in names:
            delattr(self._target, name)
        if names:
            self._also()

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
