"""Arguments, checked once before anything is allocated: a kernel can trust what it gets.

Every error reads `op: argument must <rule>, got <value>`, with the fix where there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import inf
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from .attention import Attention, RecomputedAttention, StoredAttention
from .features import Features

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)


def tensor(op: str, name: str, value: Any) -> Tensor:
    """A torch view of a torch, NumPy or DLPack array; nothing is copied, no gradient is tracked."""
    if isinstance(value, Tensor):
        t = value.detach() if value.requires_grad else value
    elif isinstance(value, np.ndarray):
        t = _from_numpy(op, name, value)
    elif hasattr(value, "__dlpack__"):
        t = _from_dlpack(op, name, value)
    else:
        kind = type(value).__name__
        raise TypeError(f"{op}: {name} must be a torch tensor, NumPy array or DLPack object, got {kind}")
    if t.layout != torch.strided or t.is_nested:
        kind = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}; call .to_dense()")
    if t.is_meta:
        raise ValueError(f"{op}: {name} must hold data on the CPU or a GPU, got a tensor on meta")
    if t.is_neg():
        raise ValueError(f"{op}: {name} must hold its own values, got a lazily negated view; call .resolve_neg()")
    if t.data_ptr() % t.element_size():
        raise ValueError(
            f"{op}: {name} must be aligned to its {t.element_size()}-byte elements, got address "
            f"{t.data_ptr():#x}; make a copy"
        )
    return t


def _from_numpy(op: str, name: str, value: Any) -> Tensor:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{op}: {name} must be a plain array, got a masked one; call .filled()")
    if any(stride < 0 for stride in value.strides):
        raise ValueError(f"{op}: {name} must run forward in memory, got strides {value.strides}; make a copy")
    try:
        if value.flags.writeable:
            return torch.from_numpy(value)
        with warnings.catch_warnings():  # read-only arrays: we do not write to inputs
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{op}: {name} must be an array torch can view, got {value.dtype}: {error}") from None


def _from_dlpack(op: str, name: str, value: Any) -> Tensor:
    try:
        return torch.from_dlpack(value)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        kind = type(value).__name__
        raise TypeError(f"{op}: {name} must be a DLPack object torch can view, got {kind}: {error}") from None


def dtype_name(t: Any) -> str:
    return str(t.dtype).removeprefix("torch.")


def floats(op: str, name: str, value: Any, ndim: tuple[int, ...], allowed: tuple[torch.dtype, ...]) -> Tensor:
    t = tensor(op, name, value)
    of_type(op, name, t, allowed)
    dimensions(op, name, t, ndim)
    return t


def of_type(op: str, name: str, t: Any, allowed: tuple[torch.dtype, ...]) -> None:
    if t.dtype not in allowed:
        names = ", ".join(str(a).removeprefix("torch.") for a in allowed)
        rule = f"one of {names}" if len(allowed) > 1 else names
        raise TypeError(f"{op}: {name} must be {rule}, got {dtype_name(t)}")


def dimensions(op: str, name: str, t: Any, ndim: tuple[int, ...]) -> None:
    if len(t.shape) not in ndim:
        rule = " or ".join(str(n) for n in ndim)
        raise ValueError(f"{op}: {name} must have {rule} dimensions, got shape {list(t.shape)}")


def rows_contiguous(op: str, name: str, t: Tensor) -> None:
    """The last dimension contiguous; the others may lie anywhere forward in memory."""
    if t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} must be contiguous in its last dimension, got strides {t.stride()}; call .contiguous()"
        )


def contiguous(op: str, name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {t.stride()}; call .contiguous()")


def shaped(op: str, name: str, t: Any, shape: tuple[int, ...], why: str) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)} ({why}), got {list(t.shape)}")


def same_device(op: str, **tensors: Tensor) -> None:
    (first, where), *rest = [(name, t.device) for name, t in tensors.items()]
    for name, device in rest:
        if device != where:
            raise ValueError(f"{op}: {name} must be on {where} as {first} is, got {device}; call .to({str(where)!r})")


def same_kind(op: str, **tensors: Any) -> None:
    """Either all float64 or none: silently mixing precisions would hide the lower one."""
    double = [name for name, t in tensors.items() if t.dtype == torch.float64]
    if double and len(double) != len(tensors):
        other = next(name for name in tensors if name not in double)
        got = dtype_name(tensors[other])
        raise TypeError(f"{op}: {other} must be float64 as {double[0]} is, got {got}; convert one of them")


def _span(t: Tensor) -> tuple[int, int]:
    """[first byte, one past the last) that t may touch."""
    if t.is_contiguous():
        return t.data_ptr(), t.data_ptr() + t.nbytes
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _share_memory(out: Tensor, t: Tensor, begin: int, end: int) -> bool:
    """Whether an element of out, [rows, columns] within [begin, end), is also one of t."""
    first, last = _span(t)
    if end <= first or last <= begin or first == last:
        return False
    pitch = out.stride(0) * out.element_size()
    if t.ndim != 2 or t.stride(0) * t.element_size() != pitch or not pitch:
        return True
    # Columns of one buffer: the same distance between rows, so it is enough to look at one row.
    offset, wide = (first - begin) % pitch, out.shape[1] * out.element_size()
    return offset < wide or offset + t.shape[1] * t.element_size() > pitch


def writable(op: str, name: str, given: Any, view: Tensor, **inputs: Any) -> None:
    """An output we add to in place: not a read-only array, no element twice, none of it an input."""
    if isinstance(given, np.ndarray) and not given.flags.writeable:
        raise ValueError(f"{op}: {name} must be writable, got a read-only array")
    if view.numel() and view.shape[0] > 1 and view.stride(0) < view.shape[1]:
        raise ValueError(f"{op}: {name} must not overlap itself, got strides {view.stride()}; call .contiguous()")
    begin, end = _span(view) if view.numel() else (0, 0)
    for other, t in inputs.items():
        if isinstance(t, Tensor) and _share_memory(view, t, begin, end):
            raise ValueError(f"{op}: {name} must not share memory with {other}, got a view of it; pass a copy")


def integers(op: str, name: str, value: Any) -> Tensor:
    """[n] int64, contiguous."""
    t = tensor(op, name, value)
    of_type(op, name, t, (torch.int64,))
    dimensions(op, name, t, (1,))
    contiguous(op, name, t)
    return t


def _facts(t: Tensor, find: Callable[[Tensor], tuple[int, ...]]) -> tuple[int, ...]:
    """What `find` says of t. Reading a GPU tensor costs a synchronisation: remembered there until torch changes it.

    On the CPU it is found anew on every call: NumPy may write to the same memory and nothing would tell.
    """
    if t.device.type == "cpu" or t.is_inference():
        return find(t)
    now = (t._version, t.data_ptr(), t.numel())
    seen = getattr(t, "_pycircuit_facts", None)
    if seen is None or seen[0] != now:
        seen = (now, find(t))
        t._pycircuit_facts = seen  # type: ignore[attr-defined]
    return seen[1]


def _ends(t: Tensor) -> tuple[int, ...]:
    """(first, last, longest step, where it first falls or -1) of offsets."""
    a = t.cpu().numpy()  # NumPy: a fifth of the cost of a torch call on a short array
    if a.size < 2:
        return int(a[0]), int(a[-1]), 0, -1
    falls = a[1:] < a[:-1]
    longest = int(np.maximum.reduce(a[1:] - a[:-1]))
    return int(a[0]), int(a[-1]), longest, int(falls.argmax()) if np.logical_or.reduce(falls) else -1


def _extremes(t: Tensor) -> tuple[int, ...]:
    if t.device.type != "cpu":
        return tuple(torch.stack(t.aminmax()).tolist())
    a = t.numpy()
    return int(np.minimum.reduce(a)), int(np.maximum.reduce(a))


def offsets(op: str, name: str, value: Any) -> tuple[Tensor, int, int]:
    """(offsets, the last, the longest step); offsets: [n + 1] int64, contiguous, from 0, never falling."""
    t = integers(op, name, value)
    if t.numel() < 1:
        raise ValueError(f"{op}: {name} must have shape [n + 1], got {list(t.shape)}")
    first, last, longest, at = _facts(t, _ends)
    if first != 0:
        raise ValueError(f"{op}: {name} must start at 0, got {first}")
    if at >= 0:
        raise ValueError(f"{op}: {name} must never fall, got {int(t[at + 1])} after {int(t[at])} at {at + 1}")
    return t, last, longest


def bounded(op: str, name: str, t: Tensor, low: int, high: int, rule: str) -> None:
    """Every entry of t from low up to, not including, high."""
    if not t.numel():
        return
    smallest, largest = _facts(t, _extremes)
    if smallest < low or largest >= high:
        raise ValueError(f"{op}: {name} must be {rule}, got {smallest if smallest < low else largest}")


def shares(op: str, name: str, t: Tensor) -> None:
    """Probabilities or the like: finite, not negative."""
    if t.numel():
        low, high = torch.stack(t.aminmax()).tolist()
        if not (low >= 0 and high < inf):
            raise ValueError(f"{op}: {name} must be finite and not negative, got {low} to {high}")


def features(op: str, value: Any, size: int) -> Features:
    """Valid CSR, every index one of the `size` rows of w_dec, as torch tensors."""
    if not isinstance(value, Features):
        raise TypeError(f"{op}: features must be pc.Features, got {type(value).__name__}")
    row_ptr, n, _ = offsets(op, "features.row_ptr", value.row_ptr)
    index = integers(op, "features.index", value.index)
    values = floats(op, "features.value", value.value, (1,), WIDE)
    shaped(op, "features.index", index, (n,), "row_ptr's last entry")
    shaped(op, "features.value", values, (n,), "row_ptr's last entry")
    contiguous(op, "features.value", values)
    same_device(op, **{"features.index": index, "features.row_ptr": row_ptr, "features.value": values})
    bounded(op, "features.index", index, 0, size, f"from 0 to below {size}, the rows of w_dec")
    if row_ptr is value.row_ptr and index is value.index and values is value.value:
        return value
    return Features(row_ptr, index, values)


def whole(op: str, name: str, value: Any, least: int) -> int:
    """A whole number, NumPy's included, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        rule = f"at least {least}" if least else "zero or positive"
        raise ValueError(f"{op}: {name} must be {rule}, got {value}")
    return int(value)


def _number(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        fix = "; call .item()" if isinstance(value, Tensor | np.ndarray) else ""
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}{fix}")
    if value != value:
        raise ValueError(f"{op}: {name} must be a number, got NaN")
    return float(value)


def activation(op: str, value: Any, size: int, like: Tensor) -> Activation:
    """An activation that fits `size` features, its thresholds float32, or float64 as w_enc is."""
    if isinstance(value, ReLU):
        return value
    if isinstance(value, TopK):
        if not isinstance(value.keep_negative, bool):
            raise TypeError(f"{op}: activation.keep_negative must be a bool, got {type(value.keep_negative).__name__}")
        return TopK(whole(op, "activation.k", value.k, 1), value.keep_negative)
    if isinstance(value, BatchTopK):
        return BatchTopK(_number(op, "activation.threshold", value.threshold))
    if not isinstance(value, JumpReLU):
        known = "pc.ReLU(), pc.JumpReLU(theta), pc.TopK(k) or pc.BatchTopK(threshold)"
        raise TypeError(f"{op}: activation must be {known}, got {type(value).__name__}")
    if isinstance(value.theta, Real):
        return JumpReLU(_number(op, "activation.theta", value.theta))
    theta = floats(op, "activation.theta", value.theta, (0, 1), FLOATS)
    if theta.numel() != 1:
        shaped(op, "activation.theta", theta, (size,), "one for each feature, or a single one")
    same_device(op, w_enc=like, **{"activation.theta": theta})
    if bool(theta.isnan().any()):
        raise ValueError(f"{op}: activation.theta must not hold NaN, got {int(theta.isnan().sum())} of them")
    return JumpReLU(theta.to(torch.float64 if like.dtype == torch.float64 else torch.float32))


def attention(op: str, value: Any, y: Tensor, longest: int) -> Attention:
    """A frozen attention that fits the gradient it is applied to, its arrays as tensors."""
    heads = y.shape[1]
    if isinstance(value, StoredAttention):
        result: Attention = _stored(op, value, y)
    elif isinstance(value, RecomputedAttention):
        result = _recomputed(op, value, y)
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


def _stored(op: str, value: StoredAttention, y: Tensor) -> StoredAttention:
    pattern = floats(op, "attention.pattern", value.pattern, (3,), WIDE)
    positions, groups = pattern.shape[1], value.kv_heads
    shaped(op, "attention.pattern", pattern, (y.shape[1], positions, positions), "heads of y x positions twice")
    contiguous(op, "attention.pattern", pattern)
    if groups is not None:
        groups = whole(op, "attention.kv_heads", groups, 1)
    same_device(op, y=y, **{"attention.pattern": pattern})
    same_kind(op, y=y, **{"attention.pattern": pattern})
    return value if pattern is value.pattern and groups is value.kv_heads else StoredAttention(pattern, groups)


def _recomputed(op: str, value: RecomputedAttention, y: Tensor) -> RecomputedAttention:
    heads = y.shape[1]
    query = floats(op, "attention.query", value.query, (3,), FLOATS)
    key = floats(op, "attention.key", value.key, (3,), FLOATS)
    normaliser = floats(op, "attention.log_sum_exp", value.log_sum_exp, (2,), WIDE)
    shaped(op, "attention.query", query, (heads, *query.shape[1:]), "heads of y first")
    shaped(op, "attention.key", key, (key.shape[0], *query.shape[1:]), "positions and width of query")
    shaped(op, "attention.log_sum_exp", normaliser, tuple(query.shape[:2]), "heads x positions")
    named = {"attention.query": query, "attention.key": key, "attention.log_sum_exp": normaliser}
    if value.sinks is not None:
        named["attention.sinks"] = floats(op, "attention.sinks", value.sinks, (1,), FLOATS)
        shaped(op, "attention.sinks", named["attention.sinks"], (heads,), "one for each head of y")
    for name, t in named.items():
        contiguous(op, name, t)
    same_device(op, y=y, **named)
    same_kind(op, y=y, **named)
    scale, softcap = (_number(op, f"attention.{n}", getattr(value, n)) for n in ("scale", "softcap"))
    for name, number in (("scale", scale), ("softcap", softcap)):
        if not 0 <= number < inf:
            raise ValueError(f"{op}: attention.{name} must be zero or positive and finite, got {number}")
    window = whole(op, "attention.window", value.window, 0)
    sinks = named.get("attention.sinks")
    return RecomputedAttention(query, key, normaliser, scale, softcap, window, sinks)
