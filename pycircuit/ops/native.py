"""The native form of every op: passes addresses of checked tensors to the C++ kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import pycircuit._native as _native

from .activations import Activation, BatchTopK, JumpReLU, TopK
from .attention import Attention, RecomputedAttention
from .dispatch import forced, native_isas
from .features import SparseFeatures

_ELEMENT = {torch.float32: 0, torch.bfloat16: 1}

# Set on every tensor whose address a kernel gets: torch's defaults are the user's to change.
_FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_INT: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}


def isa_index() -> int:
    """Index of the forced ISA, otherwise of the best this machine runs."""
    return _index_of(forced()[1])


@cache
def _index_of(isa: str | None) -> int:
    if isa is not None:
        return [name for name, _ in native_isas()].index(isa)
    return max(i for i, (_, supported) in enumerate(native_isas()) if supported)


def _weights(w: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """(address, element, rows, slots, width, row stride, slot stride) of [rows, (slots,) width]."""
    slots, slot_stride = (w.shape[1], w.stride(1)) if w.ndim == 3 else (1, 0)
    return w.data_ptr(), _ELEMENT[w.dtype], w.shape[0], slots, w.shape[-1], w.stride(0), slot_stride


def _sparse(f: SparseFeatures) -> tuple[int, int, int, int]:
    return f.row_ptr.data_ptr(), f.index.data_ptr(), f.value.data_ptr(), f.positions


def _threshold(activation: Activation) -> Tensor:
    if isinstance(activation, JumpReLU):
        return torch.as_tensor(activation.theta, **_FLOAT).reshape(-1).contiguous()
    value = max(activation.threshold, 0.0) if isinstance(activation, BatchTopK) else 0.0
    return torch.tensor([value], **_FLOAT)


def encode(x: Tensor, w_enc: Tensor, b_enc: Tensor, activation: Activation, ignore_positions: int) -> SparseFeatures:
    x, b_enc, theta = x.float(), b_enc.float(), _threshold(activation)
    top_k, keep = (activation.k, activation.keep_negative) if isinstance(activation, TopK) else (0, False)
    result = _native.encode(
        isa_index(),
        x.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        _weights(w_enc),
        b_enc.data_ptr(),
        theta.data_ptr(),
        int(theta.numel() > 1),
        top_k,
        keep,
        ignore_positions,
        torch.get_num_threads(),
    )
    row_ptr = torch.empty(len(x) + 1, **_INT)
    index, value = torch.empty(result.count, **_INT), torch.empty(result.count, **_FLOAT)
    result.copy(row_ptr.data_ptr(), index.data_ptr(), value.data_ptr())
    return SparseFeatures(row_ptr, index, value)


def decode(features: SparseFeatures, w_dec: Tensor, bias: Tensor | None) -> Tensor:
    slots = w_dec.shape[1:-1]
    out = torch.empty(*slots, features.positions, w_dec.shape[-1], **_FLOAT)
    bias = None if bias is None else bias.float().contiguous()
    _native.decode(
        isa_index(),
        _sparse(features),
        _weights(w_dec),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def attend_back(y: Tensor, prefix_ptr: Tensor, attention: Attention, out: Tensor | None, parts: int = 0) -> Tensor:
    """Run attend_back; parts: as in `product`, at most 2."""
    rows, heads, width = y.shape
    z = torch.empty(rows, attention.groups, width, **_FLOAT) if out is None else out
    if isinstance(attention, RecomputedAttention):
        query, key = attention.query.float().contiguous(), attention.key.float().contiguous()
        lse = attention.normaliser.float().contiguous()
        source = (
            0,
            attention.positions,
            query.data_ptr(),
            key.data_ptr(),
            lse.data_ptr(),
            query.shape[2],
            attention.scale,
            attention.softcap,
            attention.window,
        )
    else:
        pattern = attention.pattern.float().contiguous()
        source = (pattern.data_ptr(), attention.positions, 0, 0, 0, 0, 0.0, 0.0, 0)
    _native.attend_back(
        isa_index(),
        y.data_ptr(),
        prefix_ptr.data_ptr(),
        len(prefix_ptr) - 1,
        heads,
        attention.groups,
        width,
        z.data_ptr(),
        *source,
        torch.get_num_threads(),
        parts,
    )
    return z


def edge_scores(gradient: Tensor, prefix_ptr: Tensor, features: SparseFeatures, w_dec: Tensor, out: Tensor) -> Tensor:
    _native.edge_scores(
        isa_index(),
        gradient.data_ptr(),
        gradient.stride(0),
        prefix_ptr.data_ptr(),
        len(prefix_ptr) - 1,
        _sparse(features),
        _weights(w_dec),
        out.data_ptr(),
        out.stride(0),
        torch.get_num_threads(),
    )
    return out


def influence(rows: Tensor, node: Tensor, weight: Tensor, order: Tensor | None) -> Tensor:
    out = torch.empty(rows.shape[1], **_FLOAT)
    weight = weight.float().contiguous()
    _native.influence(
        isa_index(),
        rows.data_ptr(),
        node.shape[0],
        rows.shape[1],
        rows.stride(0),
        node.data_ptr(),
        weight.data_ptr(),
        0 if order is None else order.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def product(
    a: Tensor, b: Tensor, out: Tensor, add: bool = False, divisor: Tensor | None = None, parts: int = 0
) -> Tensor:
    """Write (a / divisor[:, None]) @ b to out, or add it, and return out: [rows, columns], float32 on the CPU.

    a: [rows, depth]; b: [depth, columns] or the transposed view of [columns, depth]; divisor: [rows]. Rows of a, out
    and b's memory may be strided. out shares no memory with the others. An element does not depend on other rows.
    parts: bfloat16 numbers that each number is the sum of, 1 to 3, where the ISA multiplies such; 0: float32 itself.
    """
    _check_product(a, b, out, divisor)
    transposed = b.stride(1) != 1 and b.shape[1] != 1
    _native.product(
        isa_index(),
        a.data_ptr(),
        a.shape[0],
        a.shape[1],
        a.stride(0),
        b.data_ptr(),
        b.shape[1],
        b.stride(1 if transposed else 0),
        transposed,
        0 if divisor is None else divisor.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        add,
        torch.get_num_threads(),
        parts,
    )
    return out


def _check_product(a: Tensor, b: Tensor, out: Tensor, divisor: Tensor | None) -> None:
    """Require matrices that fit and that the kernel can read."""
    if not (a.ndim == b.ndim == out.ndim == 2 and a.shape[1] == b.shape[0]):
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"product: a and b must be [rows, depth] and [depth, columns], got {shapes}")
    if out.shape[0] != a.shape[0] or out.shape[1] != b.shape[1]:
        raise ValueError(
            f"product: out must be {(a.shape[0], b.shape[1])}, rows of a and columns of b, got {out.shape}"
        )
    if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        raise ValueError(f"product: out must have rows apart from each other, got strides {out.stride()}; clone it")
    _check_matrix("a", a, a.stride(1) == 1 or a.shape[1] <= 1)
    _check_matrix("b", b, 1 in b.stride() or min(b.shape) <= 1)
    _check_matrix("out", out, out.stride(1) == 1 or out.shape[1] <= 1)
    if divisor is not None:
        if divisor.shape != a.shape[:1]:
            raise ValueError(f"product: divisor must be {(a.shape[0],)}, one for each row, got {tuple(divisor.shape)}")
        _check_matrix("divisor", divisor, divisor.is_contiguous())


def _check_matrix(name: str, t: Tensor, contiguous: bool) -> None:
    if t.dtype is not torch.float32 or not t.is_cpu:
        raise TypeError(f"product: {name} must be float32 on the CPU, got {t.dtype} on {t.device}; convert it")
    if not contiguous:
        rule = "contiguous along a row" + " or a column" * (name == "b")
        raise ValueError(f"product: {name} must be {rule}, got strides {t.stride()}; call .contiguous()")
