"""The attention implementation of one forward, for the thread that runs it and for no other.

A config answers with the running thread's choice before its own: another model of the same config, run in another
thread, sees a config that nobody has changed. There is no moment at which another thread could see half of a change,
and nothing to put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import local
from typing import Any
from weakref import ref

from torch import Tensor, nn

from .families import FamilyError
from .hooks import Hooks, are_active

SETTING = "_attn_implementation"
IMPLEMENTATION = "pycircuit_capture"
# (module, query, key, value, transformers' other keyword arguments) -> [prompts, positions, heads, width]
AttentionFunction = Callable[[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]

_thread = local()


@dataclass(frozen=True, eq=False)
class _AttentionChoice:
    """An attention implementation for some configs, by identity, as long as its hooks act."""

    hooks: ref[Hooks]
    configs: Mapping[int, Any]
    name: str
    function: AttentionFunction | None


def current_choice() -> _AttentionChoice | None:
    """The latest choice of this thread."""
    choice: _AttentionChoice | None = getattr(_thread, "choice", None)
    return choice if choice is not None and are_active(choice.hooks) else None


class _SettingOfThread(property):
    """transformers' property, with the running thread's choice before the config's own."""

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        choice = current_choice()
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
    """Every config of the model's modules, and those inside it, by identity."""
    waiting: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    configs: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in configs and hasattr(type(config), SETTING):
            configs[id(config)] = config
            waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return configs


@contextmanager
def use_attention(model: nn.Module, name: str, function: AttentionFunction | None = None) -> Iterator[None]:
    """Have transformers compute attention by the implementation `name` while this is open, in this thread.

    "eager" is what a family means: other implementations drop softcaps or scales in some versions.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask_function)
    configs = _configs(model)
    for config in configs.values():
        _ask_thread_first(config)
    before = getattr(_thread, "choice", None)
    with Hooks() as hooks:
        _bypass_compiled_modules(hooks, model)
        try:
            _thread.choice = _AttentionChoice(ref(hooks), configs, name, function)
            yield
        finally:
            _thread.choice = before


def use_attention_function(model: nn.Module, function: AttentionFunction) -> AbstractContextManager[None]:
    """Have `function` compute attention while this is open, in this thread."""
    return use_attention(model, IMPLEMENTATION, function)


def _bypass_compiled_modules(hooks: Hooks, model: nn.Module) -> None:
    """Run modules that torch.compile has wrapped as they are: what it compiles serves all threads alike."""
    for m in model.modules():
        if vars(m).get("_compiled_call_impl") is not None:
            hooks.replace_call(m, "_compiled_call_impl", m._call_impl)
        original = m._modules.get("_orig_mod")
        if original is not None and "forward" in vars(m):
            hooks.replace_call(m, "forward", original)


def _attention_function(
    owner: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function registered with transformers.

    query: [prompts, heads, positions, width].
    """
    choice = current_choice()
    if choice is None or choice.function is None or attention_mask is None:
        raise RuntimeError(f"capture: attention must run inside a capture, with a mask, got {type(owner).__name__}")
    return choice.function(owner, query, key, value, {**options, "attention_mask": attention_mask}), None


def _mask_function(*args: Any, **options: Any) -> Tensor:
    """The mask function registered with transformers: booleans [1, 1, positions, positions], never skipped."""
    from transformers.masking_utils import sdpa_mask

    options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask = sdpa_mask(*args, **options)
    assert mask is not None  # nothing may be skipped
    return mask
