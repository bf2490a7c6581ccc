"""Models of circuit-tracer's that were put to the test: once, as long as they are wired as they were."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_PROBED: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()  # by choice, the wiring that passed
_LOCK = Lock()


def once(model: nn.Module, choice: Any, state: Any, probe: Callable[[], None]) -> None:
    """Run the probe of a model and a choice unless it has passed in this state."""
    with _LOCK:
        if _PROBED.get(model, {}).get(choice) == state:
            return
    probe()
    with _LOCK:
        _PROBED.setdefault(model, {})[choice] = state


def wiring(model: nn.Module, config: Any) -> tuple[Any, ...]:
    """Everything a probe depends on: weights by place and version, then modules, their hooks and settings.

    Numbers are read anew for every prompt, so nothing here can make a graph stale. Not seen: a module's own attributes,
    and a change of weights through `.data` that leaves them where they are.
    """
    return tuple(map(_state, model.modules())), repr(config)


def _state(module: nn.Module) -> tuple[Any, ...]:
    """One module's part: its hooks by their numbers, which are not given again."""
    own = vars(module)
    tensors = (t for t in (*own["_parameters"].values(), *own["_buffers"].values()) if t is not None)
    hooks = tuple(own["_forward_hooks"]), tuple(own["_forward_pre_hooks"])
    return type(module), id(own.get("forward")), hooks, tuple(map(_place, tensors))


def _place(t: Tensor) -> tuple[Any, ...]:
    version = -1 if t.is_inference() else t._version  # which inference tensors do not count
    return t.data_ptr(), version, t.dtype, t.device
