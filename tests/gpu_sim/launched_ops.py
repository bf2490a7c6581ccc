"""The ops' kernels on the pretended device: checked as a launch would be, counted, and computed by the native form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pretended_cuda import COUNTS, CudaTensor, site, to_device, to_host
from torch import Tensor

from pycircuit.ops import RecomputedAttention, dispatch, native
from pycircuit.ops.registry import Op

# A recomputed pattern is written by one launch more.
LAUNCHES = {"encode": 6, "decode": 1, "attend_back": 1, "edge_scores": 1, "influence": 4}
WAITS = ("encode", "influence")  # for the number of active features, for whether rows are in order
WRITTEN = {"edge_scores": 4, "attend_back": 3}  # the argument that an op writes to


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A tensor, or a dataclass of tensors, changed."""
    if isinstance(value, Tensor) or not dataclasses.is_dataclass(value):
        return change(value)
    fields = {field.name: mapped(getattr(value, field.name), change) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)


def on_device(op: str, value: Any) -> Any:
    """The numbers of an argument of a launch, for which every address must be one of the device."""
    if isinstance(value, Tensor) and not isinstance(value, CudaTensor):
        raise ValueError(f"Pointer argument of {op} cannot be accessed from Triton (cpu tensor?)")
    return to_host(value)


def launched(op: str) -> Callable[..., Any]:
    """The form of an op that stands for its Triton kernel."""

    def call(*args: Any) -> Any:
        COUNTS.launches[site(op)] += LAUNCHES[op] + sum(isinstance(a, RecomputedAttention) for a in args)
        if op in WAITS:
            COUNTS.synchronisations[site(op)] += 1
        result = getattr(native, op)(*(mapped(a, lambda t: on_device(op, t)) for a in args))
        written = args[WRITTEN[op]] if op in WRITTEN else None
        return mapped(result, to_device) if written is None else written

    return call


def install() -> None:
    """Every op that dispatch sends to Triton goes through `launched`, whether or not Triton is installed."""
    form = Op.form
    Op.form = lambda op, name: launched(op.name) if name == "triton" else form(op, name)
    dispatch._has_triton = lambda: True
