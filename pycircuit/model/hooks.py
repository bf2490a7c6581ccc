"""Hooks and the choice of attention of one forward, for the thread that runs it and for no other.

An application may run the same model, or another one of the same config, in other threads meanwhile. Its forwards meet
our hooks, which do nothing there, and a config that nobody has changed: what a config says of its attention depends on
the thread that asks. There is no moment at which another thread could see half of a change, and nothing to put back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident, local
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .families import Family, FamilyError

SETTING = "_attn_implementation"
IMPLEMENTATION = "pycircuit_capture"
# (module, query, key, value, what else transformers says) -> [prompts, positions, heads, width]
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]

_thread = local()


@dataclass(frozen=True, eq=False)
class _Instead:
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
        self._handles: list[RemovableHandle | _Instead] = []
        self.thread = get_ident()

    def before(self, module: nn.Module, act: Callable[[Any, Any], None]) -> None:
        """Call act(args, kwargs) before every call of a module."""
        self._add(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, act)

    def after(self, module: nn.Module, act: Callable[[Any, Any, Any], Any]) -> None:
        """Call act(args, kwargs, out) after every call of a module; what it returns, if anything, replaces out."""
        self._add(module._forward_hooks, module._forward_hooks_with_kwargs, act)

    def instead(self, module: nn.Module, name: str, act: Callable[..., Any]) -> None:
        """In this thread a call that the module itself holds as an attribute, not its class, becomes `act`."""
        before, owner = vars(module)[name], ref(self)

        def call(*args: Any, **kwargs: Any) -> Any:
            return (act if _acting(owner) else before)(*args, **kwargs)

        self._handles.append(_Instead(module, name, before, call))
        vars(module)[name] = call

    def _add(
        self, hooks: MutableMapping[int, Any], with_kwargs: MutableMapping[int, bool], act: Callable[..., Any]
    ) -> None:
        """Handle and flag come before the hook: an interrupt, or a call in another thread, may fall in between."""
        handle, owner = RemovableHandle(hooks, extra_dict=with_kwargs), ref(self)
        self._handles.append(handle)

        def hook(_: nn.Module, args: Any, *more: Any) -> Any:  # another thread may still see it without its flag
            return act(args, *more) if _acting(owner) else None

        with_kwargs[handle.id] = True
        hooks[handle.id] = hook

    def remove(self) -> None:
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


def stream_into(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The stream that a module is called with, without the gradient that a hook of the user's may ask of it."""
    stream: Tensor = args[0] if args else kwargs["hidden_states"]
    return stream.detach()


def stream_out(out: Any) -> Tensor:
    """The stream that a module returned, without a gradient."""
    stream: Tensor = out[0] if isinstance(out, tuple) else out
    return stream.detach()


def require_calls(row: Family, wanted: Mapping[str, range], seen: Collection[tuple[str, int]]) -> None:
    """Raise where a hook never fired, so that what it should have written is not there.

    wanted: the layers of each entry of the row or stream; seen: (entry or stream, layer).
    """
    missing = {name: [i for i in layers if (name, i) not in seen] for name, layers in wanted.items()}
    got = ", ".join(f"no {name} in layers {layers}" for name, layers in missing.items() if layers)
    if got:
        raise FamilyError(
            f"capture: the row of {row.model_type!r} must name the modules that run, got {got}; each must be called "
            "as a module, not through its forward, and attention through transformers' attention interface"
        )


@dataclass(frozen=True, eq=False)
class _Choice:
    """An attention implementation for some configs, by identity, as long as its hooks act."""

    hooks: ref[Hooks]
    configs: Mapping[int, Any]
    name: str
    act: Attend | None


def _choice() -> _Choice | None:
    """What was chosen last for this thread."""
    choice: _Choice | None = getattr(_thread, "choice", None)
    return choice if choice is not None and _acting(choice.hooks) else None


def _acting(owner: ref[Hooks]) -> bool:
    hooks = owner()
    return hooks is not None and hooks.thread == get_ident()


class _SettingOfThread(property):
    """transformers' property, with the running thread's choice before what the config holds."""

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        choice = _choice()
        if choice is not None and id(config) in choice.configs:
            return choice.name
        return super().__get__(config, owner)


def _ask_thread_first(config: Any) -> None:
    """Put our property in the place of transformers', once and for good: elsewhere both say the same."""
    owner = next(kind for kind in type(config).__mro__ if SETTING in vars(kind))
    setting = vars(owner)[SETTING]
    if not isinstance(setting, property):
        raise FamilyError(
            f"capture: config must have transformers' property {SETTING}, got {type(setting).__name__} in "
            f"{owner.__name__}; take it out of that class"
        )
    if not isinstance(setting, _SettingOfThread):
        setattr(owner, SETTING, _SettingOfThread(setting.fget, setting.fset, setting.fdel, setting.__doc__))


def _configs(model: nn.Module) -> dict[int, Any]:
    """Every config that the model's modules hold, and those inside it."""
    waiting: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    configs: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in configs and hasattr(type(config), SETTING):
            configs[id(config)] = config
            waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return configs


@contextmanager
def attention_by(model: nn.Module, name: str, act: Attend | None = None) -> Iterator[None]:
    """transformers computes attention as `name` says while this is open, in this thread.

    "eager" is what a family means: other implementations drop softcaps or scales in some versions.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    configs = _configs(model)
    for config in configs.values():
        _ask_thread_first(config)
    before = getattr(_thread, "choice", None)
    with Hooks() as hooks:
        _uncompiled(hooks, model)
        try:
            _thread.choice = _Choice(ref(hooks), configs, name, act)
            yield
        finally:
            _thread.choice = before


def _uncompiled(hooks: Hooks, model: nn.Module) -> None:
    """Modules that torch.compile has wrapped run as they are: what it compiles serves all threads alike."""
    for m in model.modules():
        if vars(m).get("_compiled_call_impl") is not None:
            hooks.instead(m, "_compiled_call_impl", m._call_impl)
        original = m._modules.get("_orig_mod")
        if original is not None and "forward" in vars(m):
            hooks.instead(m, "forward", original)


def attending(model: nn.Module, act: Attend) -> Any:
    """`act` computes attention while this is open, in this thread."""
    return attention_by(model, IMPLEMENTATION, act)


def _attend(
    owner: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """The attention function given to transformers. query: [prompts, heads, positions, width]."""
    choice = _choice()
    if choice is None or choice.act is None or attention_mask is None:
        raise RuntimeError(f"capture: attention must run inside a capture, with a mask, got {type(owner).__name__}")
    return choice.act(owner, query, key, value, {**how, "attention_mask": attention_mask}), None


def _mask(*args: Any, **how: Any) -> Tensor:
    """The mask function given to transformers: the whole [1, 1, positions, positions] of booleans, never skipped."""
    from transformers.masking_utils import sdpa_mask

    how.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask = sdpa_mask(*args, **how)
    assert mask is not None  # nothing may be skipped
    return mask
