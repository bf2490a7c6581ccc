"""Cache of probes: a circuit-tracer model is probed once for as long as its modules and weights are the same."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_PROBED: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()  # the wiring that passed, by choice
_LOCK = Lock()


def probe_once(model: nn.Module, choice: Any, state: Any, probe: Callable[[], None]) -> None:
    """Run the probe of a model and a choice, unless it has passed in this state."""
    with _LOCK:
        if _PROBED.get(model, {}).get(choice) == state:
            return
    probe()
    with _LOCK:
        _PROBED.setdefault(model, {})[choice] = state


def wiring(model: nn.Module, config: Any) -> tuple[Any, ...]:
    """Everything a probe depends on: modules with their hooks, weights by address and version, and the configuration.

    Weights are read anew for every prompt, so the cache cannot make a graph stale. Not covered: a module's own
    attributes, and a change of weights in place through `.data`.
    """
    return tuple(map(_module_state, model.modules())), repr(config)


def _module_state(module: nn.Module) -> tuple[Any, ...]:
    """State of one module; hooks count by their ids, which are never reused."""
    own = vars(module)
    tensors = (t for t in (*own["_parameters"].values(), *own["_buffers"].values()) if t is not None)
    hooks = tuple(own["_forward_hooks"]), tuple(own["_forward_pre_hooks"])
    return type(module), id(own.get("forward")), hooks, tuple(map(_tensor_state, tensors))


def _tensor_state(t: Tensor) -> tuple[Any, ...]:
    version = -1 if t.is_inference() else t._version  # which inference tensors do not count
    return t.data_ptr(), version, t.dtype, t.device
