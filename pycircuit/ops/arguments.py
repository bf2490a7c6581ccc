"""The arguments of each op: the same parameters in, checked tensors in the forms' order out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks
from .activations import Activation
from .attention import Attention, StoredAttention
from .features import Features


def encode(x: Any, w_enc: Any, b_enc: Any, activation: Activation, ignore_positions: int = 0) -> tuple[Any, ...]:
    op = "encode"
    x = checks.floats(op, "x", x, (2,), checks.FLOATS)
    w_enc = checks.floats(op, "w_enc", w_enc, (2,), checks.FLOATS)
    b_enc = checks.floats(op, "b_enc", b_enc, (1,), checks.FLOATS)
    checks.shaped(op, "w_enc", w_enc, (w_enc.shape[0], x.shape[1]), "features x the width of x")
    checks.shaped(op, "b_enc", b_enc, (w_enc.shape[0],), "one for each row of w_enc")
    checks.rows_contiguous(op, "x", x)
    checks.rows_contiguous(op, "w_enc", w_enc)
    checks.contiguous(op, "b_enc", b_enc)
    checks.same_device(op, x=x, w_enc=w_enc, b_enc=b_enc)
    checks.same_kind(op, x=x, w_enc=w_enc, b_enc=b_enc)
    checks.activation(op, activation, w_enc.shape[0], w_enc)
    if isinstance(ignore_positions, bool) or not isinstance(ignore_positions, int):
        raise TypeError(f"{op}: ignore_positions must be an int, got {type(ignore_positions).__name__}")
    if ignore_positions < 0:
        raise ValueError(f"{op}: ignore_positions must not be negative, got {ignore_positions}")
    return x, w_enc, b_enc, activation, min(ignore_positions, len(x))


def decode(features: Features, w_dec: Any, bias: Any = None) -> tuple[Any, ...]:
    op = "decode"
    w_dec = checks.floats(op, "w_dec", w_dec, (2, 3), checks.FLOATS)
    checks.rows_contiguous(op, "w_dec", w_dec)
    features = checks.features(op, features, w_dec.shape[0])
    checks.same_device(op, w_dec=w_dec, **{"features.index": features.index})
    checks.same_kind(op, w_dec=w_dec, **{"features.value": features.value})
    if bias is not None:
        bias = checks.floats(op, "bias", bias, (1, 2), checks.FLOATS)
        checks.shaped(op, "bias", bias, tuple(w_dec.shape[1:]), "w_dec without its features")
        checks.same_device(op, w_dec=w_dec, bias=bias)
        checks.same_kind(op, w_dec=w_dec, bias=bias)
    return features, w_dec, bias


def _ragged(op: str, name: str, ragged: Tensor, prefix_ptr: Any) -> Tensor:
    prefix_ptr = checks.pointers(op, "prefix_ptr", prefix_ptr)
    if int(prefix_ptr[-1]) != ragged.shape[0]:
        raise ValueError(
            f"{op}: prefix_ptr must end at the {ragged.shape[0]} rows of {name}, got {int(prefix_ptr[-1])}"
        )
    return prefix_ptr


def attend_back(y: Any, prefix_ptr: Any, attention: Attention, out: Any = None) -> tuple[Any, ...]:
    op = "attend_back"
    y = checks.floats(op, "y", y, (3,), checks.WIDE)
    checks.contiguous(op, "y", y)
    prefix_ptr = _ragged(op, "y", y, prefix_ptr)
    longest = int(prefix_ptr.diff().max()) if prefix_ptr.numel() > 1 else 0
    attention = checks.attention(op, attention, y.shape[1], longest)
    first = attention.pattern if isinstance(attention, StoredAttention) else attention.query
    checks.same_device(op, y=y, prefix_ptr=prefix_ptr, attention=first)
    checks.same_kind(op, y=y, attention=first)
    if out is None:
        return y, prefix_ptr, attention, None
    z = checks.floats(op, "out", out, (3,), checks.WIDE)
    checks.shaped(op, "out", z, (y.shape[0], attention.groups, y.shape[2]), "rows x kv heads x width")
    checks.contiguous(op, "out", z)
    checks.writable(op, "out", out, z)
    checks.same_device(op, y=y, out=z)
    checks.same_kind(op, y=y, out=z)
    return y, prefix_ptr, attention, z


def edge_scores(gradient: Any, prefix_ptr: Any, features: Features, w_dec: Any, out: Any) -> tuple[Any, ...]:
    op = "edge_scores"
    gradient = checks.floats(op, "gradient", gradient, (2,), checks.WIDE)
    w_dec = checks.floats(op, "w_dec", w_dec, (2,), checks.FLOATS)
    writable = checks.floats(op, "out", out, (2,), checks.WIDE)
    checks.rows_contiguous(op, "gradient", gradient)
    checks.rows_contiguous(op, "w_dec", w_dec)
    checks.rows_contiguous(op, "out", writable)
    checks.shaped(op, "w_dec", w_dec, (w_dec.shape[0], gradient.shape[1]), "features x the width of gradient")
    prefix_ptr = _ragged(op, "gradient", gradient, prefix_ptr)
    features = checks.features(op, features, w_dec.shape[0])
    checks.shaped(op, "out", writable, (prefix_ptr.numel() - 1, features.count), "targets x active features")
    checks.writable(op, "out", out, writable)
    checks.same_device(op, gradient=gradient, prefix_ptr=prefix_ptr, w_dec=w_dec, index=features.index, out=writable)
    checks.same_kind(op, gradient=gradient, w_dec=w_dec, out=writable, **{"features.value": features.value})
    return gradient, prefix_ptr, features, w_dec, writable


def influence(rows: Any, node: Any, weight: Any) -> tuple[Any, ...]:
    op = "influence"
    rows = checks.floats(op, "rows", rows, (2,), checks.WIDE)
    node = checks.tensor(op, "node", node)
    weight = checks.floats(op, "weight", weight, (1,), checks.WIDE)
    checks.rows_contiguous(op, "rows", rows)
    if node.dtype != torch.int64:
        raise TypeError(f"{op}: node must be int64, got {str(node.dtype).removeprefix('torch.')}")
    checks.shaped(op, "node", node, (rows.shape[0],), "one for each row")
    checks.shaped(op, "weight", weight, (rows.shape[0],), "one for each row")
    checks.contiguous(op, "node", node)
    checks.same_device(op, rows=rows, node=node, weight=weight)
    checks.same_kind(op, rows=rows, weight=weight)
    if node.numel() and not (int(node.min()) >= -1 and int(node.max()) < rows.shape[1]):
        wrong = int(node.max()) if int(node.max()) >= rows.shape[1] else int(node.min())
        raise ValueError(f"{op}: node must be -1 or a column below {rows.shape[1]}, got {wrong}")
    if bool((~weight.isfinite()).any()) or bool((weight < 0).any()):
        raise ValueError(f"{op}: weight must be finite and not negative, got {weight.min()} to {weight.max()}")
    return rows, node, weight


CHECKS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "encode": encode,
    "decode": decode,
    "attend_back": attend_back,
    "edge_scores": edge_scores,
    "influence": influence,
}
