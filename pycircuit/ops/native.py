"""The native form of every op: passes addresses of checked tensors to the C++ kernels."""

from __future__ import annotations

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
    names = [name for name, _ in native_isas()]
    chosen = forced()[1]
    if chosen is not None:
        return names.index(chosen)
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


def attend_back(y: Tensor, prefix_ptr: Tensor, attention: Attention, out: Tensor | None) -> Tensor:
    rows, heads, width = y.shape
    z = torch.empty(rows, attention.groups, width, **_FLOAT) if out is None else out
    if isinstance(attention, RecomputedAttention):
        query, key = attention.query.float().contiguous(), attention.key.float().contiguous()
        lse = attention.normaliser().float().contiguous()
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
