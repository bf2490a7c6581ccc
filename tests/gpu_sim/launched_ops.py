"""Kernels of the ops on the pretended device: checked like a launch, counted, and computed by the native form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
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

    def call(*args: Any, parts: int = 3) -> Any:
        COUNTS.launches[site(op)] += LAUNCHES[op] + sum(isinstance(a, RecomputedAttention) for a in args)
        if op in WAITS:
            COUNTS.synchronisations[site(op)] += 1
        result = getattr(native, op)(*(mapped(a, lambda t: on_device(op, t)) for a in args))
        written = args[WRITTEN[op]] if op in WRITTEN else None
        return mapped(result, to_device) if written is None else written

    return call


def launched_split(numbers: Tensor, count: int, sigma: Tensor | None = None, position: Tensor | None = None) -> Tensor:
    """Stand in for the kernel that splits rows into bfloat16 parts."""
    COUNTS.launches[site("split")] += 1
    remainder, terms = on_device("split", numbers), []
    if sigma is not None:
        remainder = remainder / on_device("split", sigma)[on_device("split", position)][:, None]
    for _ in range(count):
        terms.append(remainder.to(torch.bfloat16))
        remainder = remainder - terms[-1]
    return to_device(torch.cat([term for n in range(count, 0, -1) for term in terms[:n]], 1))


def launched_norm_back(
    gradient: Tensor, gain: Tensor | None, sigma: Tensor, cell: Tensor, layer: Tensor | None = None
) -> Tensor:
    """Stand in for the kernel that divides rows by norms' denominators."""
    COUNTS.launches[site("norm_back")] += 1
    gradient, gain, sigma, cell, layer = (on_device("norm_back", t) for t in (gradient, gain, sigma, cell, layer))
    if gain is not None:
        gradient = gradient * (gain if layer is None else gain[layer])
    return to_device(gradient / sigma.flatten()[cell][:, None])


def launched_spread(
    vectors: Tensor,
    pattern: Tensor,
    query: Tensor | None,
    column_sigma: Tensor | None,
    row_sigma: Tensor | None,
    prefix_ptr: Tensor,
    longest: int,
    out: Tensor,
) -> None:
    """Stand in for the kernel that spreads targets' vectors over their rows."""
    COUNTS.launches[site("spread")] += 1
    tensors = (vectors, pattern, query, column_sigma, row_sigma, prefix_ptr, out)
    vectors, pattern, query, column_sigma, row_sigma, prefix_ptr, out = (on_device("spread", t) for t in tensors)
    for t, (begin, end) in enumerate(pairwise((prefix_ptr - prefix_ptr[0]).tolist())):
        length = end - begin
        assert length <= longest
        share = pattern[:, t if query is None else query[t], :length]
        if column_sigma is not None:
            share = share / column_sigma[:length]
        rows = share.T @ vectors[:-1, t]
        rows[-1] += vectors[-1, t]
        out[begin:end] = rows if row_sigma is None else rows / row_sigma[:length, None]


def launched_cross_layer(
    joined: Any, target_layer: int, gradient: Tensor, prefix_ptr: Tensor, out: Tensor, parts: int = 3
) -> None:
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
    import_module("pycircuit.kernels.norm_back").norm_back = launched_norm_back
    import_module("pycircuit.kernels.spread").spread = launched_spread
    import_module("pycircuit.kernels.edge_scores").cross_layer_scores = launched_cross_layer
    Op.form = lambda op, name: launched(op.name) if name == "triton" else form(op, name)
    dispatch._has_triton = lambda: True
