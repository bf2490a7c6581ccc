"""Hooks on the modules of one forward, for the thread that runs it and for no other.

An application may run the same model in other threads meanwhile: its forwards meet our hooks, which do nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from threading import get_ident
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .families import Family, FamilyError


@dataclass(frozen=True, eq=False)
class _ReplacedCall:
    """A call of a module that was replaced, to be put back unless somebody replaced it again."""

    module: nn.Module
    name: str
    before: Callable[..., Any]
    call: Callable[..., Any]

    def remove(self) -> None:
        if vars(self.module).get(self.name) is self.call:
            vars(self.module)[self.name] = self.before


class Hooks:
    """Forward hooks that act in the thread that made them, until they are removed together.

    They go with this object too: an interrupt may fall into the very statement that removes them.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle | _ReplacedCall] = []
        self.thread = get_ident()

    def before(self, module: nn.Module, function: Callable[[Any, Any], None]) -> None:
        """Call function(args, kwargs) before every call of a module."""
        self._add(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, function)

    def after(self, module: nn.Module, function: Callable[[Any, Any, Any], Any]) -> None:
        """Call function(args, kwargs, out) after every call of a module; a result that is not None replaces out."""
        self._add(module._forward_hooks, module._forward_hooks_with_kwargs, function)

    def replace_call(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Call `function`, in this thread, in place of a callable that the module itself has as an attribute."""
        before, owner = vars(module)[name], ref(self)

        def call(*args: Any, **kwargs: Any) -> Any:
            return (function if are_active(owner) else before)(*args, **kwargs)

        self._handles.append(_ReplacedCall(module, name, before, call))
        vars(module)[name] = call

    def _add(
        self, hooks: MutableMapping[int, Any], with_kwargs: MutableMapping[int, bool], function: Callable[..., Any]
    ) -> None:
        """Add a hook.

        Handle and flag come first: an interrupt, or a call in another thread, may fall in between.
        """
        handle, owner = RemovableHandle(hooks, extra_dict=with_kwargs), ref(self)
        self._handles.append(handle)

        def hook(_: nn.Module, args: Any, *more: Any) -> Any:  # another thread may still see it without its flag
            return function(args, *more) if are_active(owner) else None

        with_kwargs[handle.id] = True
        hooks[handle.id] = hook

    def remove(self) -> None:
        """Remove every hook, the last first."""
        self.thread = 0  # no thread has this number
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __del__(self) -> None:
        if getattr(self, "_handles", ()):  # an interrupt may come before there are any
            self.remove()


def are_active(owner: ref[Hooks]) -> bool:
    """True for hooks that exist and belong to the running thread."""
    hooks = owner()
    return hooks is not None and hooks.thread == get_ident()


def stream_into(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The stream that a module is called with, without the gradient that a hook of the user's may ask of it."""
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream.detach()


def stream_out(out: Any) -> Tensor:
    """The stream that a module returned, without a gradient."""
    stream: Tensor = out[0] if isinstance(out, tuple) else out
    return stream.detach()


def require_calls(family: Family, wanted: Mapping[str, range], called: Collection[tuple[str, int]]) -> None:
    """Raise where a hook never fired, so that what it should have written is not there.

    wanted: the layers of each entry of the family or stream; called: (entry or stream, layer).
    """
    missing = {name: [i for i in layers if (name, i) not in called] for name, layers in wanted.items()}
    absent = ", ".join(f"no {name} in layers {layers}" for name, layers in missing.items() if layers)
    if absent:
        raise FamilyError(
            f"capture: the row of {family.model_type!r} must name the modules that run, got {absent}; each must be "
            "called as a module, not through its forward, and attention through transformers' attention interface"
        )
