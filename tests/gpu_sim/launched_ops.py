"""Kernels of the ops on the pretended device: checked like a launch, counted, and computed by the native form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from pretended_cuda import COUNTS, CudaTensor, site, to_device, to_host
from torch import Tensor

from pycircuit.ops import RecomputedAttention, dispatch, native
from pycircuit.ops.registry import Op

# A recomputed pattern is written by one launch more.
LAUNCHES = {"encode": 6, "decode": 1, "attend_back": 1, "edge_scores": 1, "influence": 4}
WAITS = ("encode", "influence")  # for the number of active features, for whether rows are in order
WRITTEN = {"edge_scores": 4, "attend_back": 3}  # the argument that an op writes to


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to a tensor, or to every field of a dataclass of tensors."""
    if isinstance(value, Tensor) or not dataclasses.is_dataclass(value):
        return change(value)
    fields = {field.name: mapped(getattr(value, field.name), change) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)


def on_device(op: str, value: Any) -> Any:
    """Return the numbers of a launch's argument, whose address must be on the device."""
    if isinstance(value, Tensor) and not isinstance(value, CudaTensor):
        raise ValueError(f"Pointer argument of {op} cannot be accessed from Triton (cpu tensor?)")
    return to_host(value)


def launched(op: str) -> Callable[..., Any]:
    """Return the form of an op that stands for its Triton kernel."""

    def call(*args: Any) -> Any:
        COUNTS.launches[site(op)] += LAUNCHES[op] + sum(isinstance(a, RecomputedAttention) for a in args)
        if op in WAITS:
            COUNTS.synchronisations[site(op)] += 1
        result = getattr(native, op)(*(mapped(a, lambda t: on_device(op, t)) for a in args))
        written = args[WRITTEN[op]] if op in WRITTEN else None
        return mapped(result, to_device) if written is None else written

    return call


def launched_split(numbers: Tensor, count: int) -> Tensor:
    """Stand in for the kernel that splits rows into bfloat16 parts."""
    COUNTS.launches[site("split")] += 1
    remainder, terms = on_device("split", numbers), []
    for _ in range(count):
        terms.append(remainder.to(torch.bfloat16))
        remainder = remainder - terms[-1]
    return to_device(torch.cat([term for n in range(count, 0, -1) for term in terms[:n]], 1))


def launched_cross_layer(joined: Any, target_layer: int, gradient: Tensor, prefix_ptr: Tensor, out: Tensor) -> None:
    """Stand in for the kernel that scores the features of all layers of a cross-layer transcoder."""
    COUNTS.launches[site("edge_scores")] += 1
    rows, ptr, scores, begin = *(on_device("edge_scores", t) for t in (gradient, prefix_ptr, out)), 0
    for layer, (w, active) in enumerate(zip(joined.w_dec[: target_layer + 1], joined.features, strict=False)):
        end = begin + active.count
        if active.count:
            features = mapped(active, lambda t: on_device("edge_scores", t))
            decoder = on_device("edge_scores", w)[:, target_layer - layer]
            native.edge_scores(rows, ptr, features, decoder, scores[:, begin:end])
        begin = end


def install() -> None:
    """Send every op that dispatch sends to Triton through `launched`, whether or not Triton is installed."""
    form = Op.form
    import_module("pycircuit.kernels.split").split = launched_split
    import_module("pycircuit.kernels.edge_scores").cross_layer_scores = launched_cross_layer
    Op.form = lambda op, name: launched(op.name) if name == "triton" else form(op, name)
    dispatch._has_triton = lambda: True
