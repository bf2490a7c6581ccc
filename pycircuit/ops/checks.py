"""Checks of arguments, made once before anything is allocated, so that kernels can trust them.

Every error reads `op: argument must <rule>, got <value>`, with the fix where there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)


def tensor(op: str, name: str, value: Any) -> Tensor:
    """View a torch, NumPy or DLPack array as a tensor; nothing is copied, no gradient is tracked."""
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
    address = _address(op, name, t)
    if address % t.element_size():
        raise ValueError(
            f"{op}: {name} must be aligned to its {t.element_size()}-byte elements, got address {address:#x}; "
            "make a copy"
        )
    return t


def _address(op: str, name: str, t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:
        raise TypeError(
            f"{op}: {name} must be a tensor with memory of its own, got one without, such as torch.func's transforms "
            "(vmap, grad, jvp) and tracers make"
        ) from None


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
        return from_dlpack(value)
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
    """Require a contiguous last dimension; the others may have any positive strides."""
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
    (first, device), *others = [(name, t.device) for name, t in tensors.items()]
    for name, other in others:
        if other != device:
            raise ValueError(f"{op}: {name} must be on {device} as {first} is, got {other}; call .to({str(device)!r})")


def same_kind(op: str, **tensors: Any) -> None:
    """Require all float64 or none: silently mixing precisions would hide the lower one."""
    double = [name for name, t in tensors.items() if t.dtype == torch.float64]
    if double and len(double) != len(tensors):
        other = next(name for name in tensors if name not in double)
        got = dtype_name(tensors[other])
        raise TypeError(f"{op}: {other} must be float64 as {double[0]} is, got {got}; convert one of them")


def _span(t: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of t and one past its last."""
    if t.is_contiguous():
        return t.data_ptr(), t.data_ptr() + t.nbytes
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _share_memory(out: Tensor, t: Tensor, begin: int, end: int) -> bool:
    """Tell if an element of out, [rows, columns] within [begin, end), is also one of t."""
    first, last = _span(t)
    if end <= first or last <= begin or first == last:
        return False
    pitch = out.stride(0) * out.element_size()
    if t.ndim != 2 or t.stride(0) * t.element_size() != pitch or not pitch:
        return True
    # Columns of one buffer: the same distance between rows, so it is enough to look at one row.
    offset, wide = (first - begin) % pitch, out.shape[1] * out.element_size()
    return offset < wide or offset + t.shape[1] * t.element_size() > pitch


def writable(op: str, name: str, argument: Any, view: Tensor, **inputs: Any) -> None:
    """Require an output that can be written in place: not read-only, not overlapping itself or an input."""
    if isinstance(argument, np.ndarray) and not argument.flags.writeable:
        raise ValueError(f"{op}: {name} must be writable, got a read-only array")
    if view.numel() and view.shape[0] > 1 and view.stride(0) < view.shape[1]:
        raise ValueError(f"{op}: {name} must not overlap itself, got strides {view.stride()}; call .contiguous()")
    begin, end = _span(view) if view.numel() else (0, 0)
    for other, t in inputs.items():
        if isinstance(t, Tensor) and _share_memory(view, t, begin, end):
            raise ValueError(f"{op}: {name} must not share memory with {other}, got a view of it; pass a copy")


def integers(op: str, name: str, value: Any) -> Tensor:
    """Contiguous int64 tensor: [n]."""
    t = tensor(op, name, value)
    of_type(op, name, t, (torch.int64,))
    dimensions(op, name, t, (1,))
    contiguous(op, name, t)
    return t


def _facts(t: Tensor, find: Callable[[Tensor], tuple[int, ...]]) -> tuple[int, ...]:
    """Result of `find(t)`, cached on a GPU tensor, where reading costs a synchronisation, until torch changes it.

    Nothing is cached on the CPU: NumPy may write to the same memory unnoticed.
    """
    if t.device.type == "cpu" or t.is_inference():
        return find(t)
    now = (t._version, t.data_ptr(), t.numel())
    seen = getattr(t, "_pycircuit_facts", None)
    if seen is None or seen[0] != now:
        seen = (now, {})
        t._pycircuit_facts = seen  # type: ignore[attr-defined]
    facts: dict[Any, tuple[int, ...]] = seen[1]
    if find not in facts:
        facts[find] = find(t)
    return facts[find]


def known_offsets(t: Tensor, values: Sequence[int] | np.ndarray) -> Tensor:
    """Cache the ends of offsets that the host has a copy of, so that no check reads them from a device."""
    if t.device.type != "cpu":
        _remember(t, _ends, _ends(torch.from_numpy(np.asarray(values, np.int64))))
    return t


def known_bounds(t: Tensor, smallest: int, largest: int) -> None:
    """Cache the bounds of t that the host knows, so that no check reads them from a device."""
    _remember(t, _extremes, (smallest, largest))


def _remember(t: Tensor, find: Callable[[Tensor], tuple[int, ...]], fact: tuple[int, ...]) -> None:
    if t.device.type != "cpu" and not t.is_inference():
        t._pycircuit_facts = ((t._version, t.data_ptr(), t.numel()), {find: fact})  # type: ignore[attr-defined]


def _ends(t: Tensor) -> tuple[int, ...]:
    """(first, last, longest step, index before the first fall or -1) of offsets."""
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


def _nan_count(t: Tensor) -> tuple[int]:
    return (int(t.isnan().sum()),)


def offsets(op: str, name: str, value: Any) -> tuple[Tensor, int, int]:
    """(offsets, the last, the longest step) of [n + 1] int64 that start at 0 and never fall."""
    t = integers(op, name, value)
    if t.numel() < 1:
        raise ValueError(f"{op}: {name} must have shape [n + 1], got {list(t.shape)}")
    first, last, longest, fall = _facts(t, _ends)
    if first != 0:
        raise ValueError(f"{op}: {name} must start at 0, got {first}")
    if fall >= 0:
        raise ValueError(f"{op}: {name} must never fall, got {int(t[fall + 1])} after {int(t[fall])} at {fall + 1}")
    return t, last, longest


def _first_entry(mask: Tensor) -> int:
    return int(mask.nonzero()[0])


def bounded(op: str, name: str, t: Tensor, low: int, high: int, rule: str) -> None:
    """Require every entry of t from low up to, not including, high."""
    if not t.numel():
        return
    smallest, largest = _facts(t, _extremes)
    if smallest < low or largest >= high:
        value = smallest if smallest < low else largest
        raise ValueError(f"{op}: {name} must be {rule}, got {value} at entry {_first_entry(t == value)}")


def without_nan(op: str, name: str, t: Tensor) -> None:
    """Require no NaN in t."""
    (count,) = _facts(t, _nan_count)
    if count:
        entry = _first_entry(t.flatten().isnan())
        raise ValueError(f"{op}: {name} must not hold NaN, got {count} of them, the first at entry {entry}")


def shares(op: str, name: str, t: Tensor) -> None:
    """Require probabilities or the like: finite, not negative."""
    if t.numel():
        low, high = torch.stack(t.aminmax()).tolist()
        if not (low >= 0 and high < inf):
            entry = _first_entry(~((t.flatten() >= 0) & (t.flatten() < inf)))
            value = float(t.flatten()[entry])
            raise ValueError(f"{op}: {name} must be finite and not negative, got {value} at entry {entry}")


def is_int(value: Any) -> TypeGuard[int]:
    """Tell if a value is an int or a NumPy integer, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(op: str, name: str, value: Any, least: int) -> int:
    """Require an int, or a NumPy integer, of at least `least`."""
    if not is_int(value):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        rule = f"at least {least}" if least else "zero or positive"
        raise ValueError(f"{op}: {name} must be {rule}, got {value}")
    return int(value)


def number(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        fix = "; call .item()" if isinstance(value, Tensor | np.ndarray) else ""
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}{fix}")
    if value != value:
        raise ValueError(f"{op}: {name} must be a number, got NaN")
    return float(value)
