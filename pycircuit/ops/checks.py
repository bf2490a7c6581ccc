"""Arguments, checked once before anything is allocated: a kernel can trust what it gets.

Every error reads `op: argument must <rule>, got <value>`, with the fix where there is one.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .activations import BatchTopK, JumpReLU, ReLU, TopK
from .attention import Attention, RecomputedAttention, StoredAttention
from .features import Features

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)


def tensor(op: str, name: str, value: Any) -> Tensor:
    """A torch view of a torch, NumPy or DLPack array; nothing is copied."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}; call .to_dense()")
        return value.detach()
    if isinstance(value, np.ndarray):
        with warnings.catch_warnings():  # read-only arrays: we do not write to inputs
            warnings.simplefilter("ignore", UserWarning)
            try:
                return torch.from_numpy(value)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{op}: {name} must be an array torch can view, got {value.dtype}: {error}") from None
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    kind = type(value).__name__
    raise TypeError(f"{op}: {name} must be a torch tensor, NumPy array or DLPack object, got {kind}")


def floats(op: str, name: str, value: Any, ndim: tuple[int, ...], allowed: tuple[torch.dtype, ...]) -> Tensor:
    t = tensor(op, name, value)
    if t.dtype not in allowed:
        names = ", ".join(str(a).removeprefix("torch.") for a in allowed)
        raise TypeError(f"{op}: {name} must be one of {names}, got {str(t.dtype).removeprefix('torch.')}")
    if t.ndim not in ndim:
        rule = " or ".join(str(n) for n in ndim)
        raise ValueError(f"{op}: {name} must have {rule} dimensions, got shape {list(t.shape)}")
    return t


def rows_contiguous(op: str, name: str, t: Tensor) -> None:
    """The last dimension contiguous; the others may lie anywhere forward in memory."""
    if t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} must be contiguous in its last dimension, got strides {t.stride()}; call .contiguous()"
        )


def contiguous(op: str, name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {t.stride()}; call .contiguous()")


def shaped(op: str, name: str, t: Tensor, shape: tuple[int, ...], why: str) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)} ({why}), got {list(t.shape)}")


def same_device(op: str, **tensors: Tensor) -> None:
    (first, where), *rest = [(name, t.device) for name, t in tensors.items()]
    for name, device in rest:
        if device != where:
            raise ValueError(f"{op}: {name} must be on {where} as {first} is, got {device}; call .to({str(where)!r})")


def same_kind(op: str, **tensors: Tensor) -> None:
    """Either all float64 or none: silently mixing precisions would hide the lower one."""
    double = [name for name, t in tensors.items() if t.dtype == torch.float64]
    if double and len(double) != len(tensors):
        other = next(name for name in tensors if name not in double)
        got = str(tensors[other].dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {other} must be float64 as {double[0]} is, got {got}; convert one of them")


def writable(op: str, name: str, given: Any, view: Tensor) -> None:
    """An output we add to in place: not a read-only array, no element twice."""
    if isinstance(given, np.ndarray) and not given.flags.writeable:
        raise ValueError(f"{op}: {name} must be writable, got a read-only array")
    if view.numel() and view.shape[0] > 1 and view.stride(0) < view.shape[1]:
        raise ValueError(f"{op}: {name} must not overlap itself, got strides {view.stride()}; call .contiguous()")


def pointers(op: str, name: str, value: Any) -> Tensor:
    """Offsets: [n + 1] int64, contiguous, from 0, never falling."""
    t = tensor(op, name, value)
    if t.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {str(t.dtype).removeprefix('torch.')}")
    if t.ndim != 1 or t.numel() < 1:
        raise ValueError(f"{op}: {name} must have shape [n + 1], got {list(t.shape)}")
    contiguous(op, name, t)
    if int(t[0]) != 0:
        raise ValueError(f"{op}: {name} must start at 0, got {int(t[0])}")
    if bool((t[1:] < t[:-1]).any()):
        at = int((t[1:] < t[:-1]).nonzero()[0]) + 1
        raise ValueError(f"{op}: {name} must never fall, got {int(t[at])} after {int(t[at - 1])} at {at}")
    return t


def _versions(f: Features) -> tuple[int, ...] | None:
    if any(t.is_inference() for t in (f.row_ptr, f.index)):
        return None
    return f.row_ptr._version, f.index._version, f.index.data_ptr()


def features(op: str, value: Any, size: int) -> Features:
    """Valid CSR with every index below `size`. Remembered until its tensors change."""
    if not isinstance(value, Features):
        raise TypeError(f"{op}: features must be pc.Features, got {type(value).__name__}")
    seen = _versions(value) if isinstance(value.index, Tensor) and isinstance(value.row_ptr, Tensor) else None
    if seen is not None and value._checked is not None and value._checked[1:] == seen:
        largest = value._checked[0]
        result = value
    else:
        row_ptr = pointers(op, "features.row_ptr", value.row_ptr)
        index, values = tensor(op, "features.index", value.index), tensor(op, "features.value", value.value)
        if index.dtype != torch.int64:
            raise TypeError(f"{op}: features.index must be int64, got {str(index.dtype).removeprefix('torch.')}")
        if values.dtype not in WIDE:
            got = str(values.dtype).removeprefix("torch.")
            raise TypeError(f"{op}: features.value must be float32 or float64, got {got}; call .float()")
        n = int(row_ptr[-1])
        shaped(op, "features.index", index, (n,), "row_ptr's last entry")
        shaped(op, "features.value", values, (n,), "row_ptr's last entry")
        contiguous(op, "features.index", index)
        contiguous(op, "features.value", values)
        same_device(op, index=index, row_ptr=row_ptr, value=values)
        smallest, largest = (int(index.min()), int(index.max())) if n else (0, -1)
        if smallest < 0:
            raise ValueError(f"{op}: features.index must not be negative, got {smallest}")
        result = value if isinstance(value.value, Tensor) and seen is not None else Features(row_ptr, index, values)
        remember(result, largest)
    if largest >= size:
        raise ValueError(f"{op}: features.index must be below {size}, the rows of w_dec, got {largest}")
    return result


def remember(f: Features, largest: int) -> None:
    """Mark as checked in its present state: CSR holds and no index is above `largest`."""
    seen = _versions(f)
    object.__setattr__(f, "_checked", None if seen is None else (largest, *seen))


def activation(op: str, value: Any, size: int, like: Tensor) -> None:
    if isinstance(value, JumpReLU) and isinstance(value.theta, Tensor):
        theta = value.theta
        if theta.dtype not in FLOATS:
            got = str(theta.dtype).removeprefix("torch.")
            raise TypeError(f"{op}: activation.theta must be floating point, got {got}")
        if theta.numel() != 1:
            shaped(op, "activation.theta", theta, (size,), "one for each feature")
        same_device(op, w_enc=like, **{"activation.theta": theta})
        if bool(theta.isnan().any()):
            raise ValueError(f"{op}: activation.theta must not hold NaN, got {int(theta.isnan().sum())}")
    elif isinstance(value, JumpReLU | BatchTopK):
        number = value.theta if isinstance(value, JumpReLU) else value.threshold
        if not isinstance(number, int | float):
            raise TypeError(f"{op}: the activation's threshold must be a number or tensor, got {type(number).__name__}")
        if number != number:
            raise ValueError(f"{op}: the activation's threshold must be a number, got NaN")
    elif isinstance(value, TopK):
        if not isinstance(value.k, int) or isinstance(value.k, bool):
            raise TypeError(f"{op}: activation.k must be an int, got {type(value.k).__name__}")
        if not value.k >= 1:
            raise ValueError(f"{op}: activation.k must be at least 1, got {value.k}")
    elif not isinstance(value, ReLU):
        known = "pc.ReLU(), pc.JumpReLU(theta), pc.TopK(k) or pc.BatchTopK(threshold)"
        raise TypeError(f"{op}: activation must be {known}, got {type(value).__name__}")


def attention(op: str, value: Any, heads: int, longest: int) -> Attention:
    """A frozen attention that fits the gradient it is applied to, its arrays as tensors."""
    if isinstance(value, StoredAttention):
        pattern = floats(op, "attention.pattern", value.pattern, (3,), WIDE)
        contiguous(op, "attention.pattern", pattern)
        positions = pattern.shape[1]
        shaped(op, "attention.pattern", pattern, (heads, positions, positions), "heads of y x positions twice")
        result: Attention = replace(value, pattern=pattern)
    elif isinstance(value, RecomputedAttention):
        query = floats(op, "attention.query", value.query, (3,), FLOATS)
        key = floats(op, "attention.key", value.key, (3,), FLOATS)
        lse = floats(op, "attention.log_sum_exp", value.log_sum_exp, (2,), WIDE)
        for name, t in (("query", query), ("key", key), ("log_sum_exp", lse)):
            contiguous(op, f"attention.{name}", t)
        positions, sinks = query.shape[1], value.sinks
        shaped(op, "attention.query", query, (heads, *query.shape[1:]), "heads of y first")
        shaped(op, "attention.key", key, (key.shape[0], *query.shape[1:]), "positions and width of query")
        shaped(op, "attention.log_sum_exp", lse, (heads, positions), "heads x positions")
        if sinks is not None:
            sinks = floats(op, "attention.sinks", sinks, (1,), FLOATS)
            shaped(op, "attention.sinks", sinks, (heads,), "one for each head of y")
            same_device(op, query=query, sinks=sinks)
        for name, number in (("scale", value.scale), ("softcap", value.softcap), ("window", value.window)):
            if number is None or not number >= 0:
                raise ValueError(f"{op}: attention.{name} must be zero (none) or positive, got {number}")
        same_device(op, query=query, key=key, log_sum_exp=lse)
        result = replace(value, query=query, key=key, log_sum_exp=lse, sinks=sinks)
    else:
        known = "pc.ops.StoredAttention or pc.ops.RecomputedAttention"
        raise TypeError(f"{op}: attention must be {known}, got {type(value).__name__}")
    if result.groups < 1 or heads % result.groups:
        raise ValueError(f"{op}: attention's kv heads must divide the {heads} heads of y, got {result.groups}")
    if longest > result.positions:
        raise ValueError(
            f"{op}: prefix_ptr must hold no prefix longer than the attention's {result.positions} positions, "
            f"got {longest}"
        )
    return result
