"""Checked arguments of each op, in the order of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import checks, compound
from .activations import Activation
from .attention import Attention
from .features import SparseFeatures
from .file_rows import FileRows


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
    ignored = checks.whole(op, "ignore_positions", ignore_positions, 0)
    return x, w_enc, b_enc, compound.activation(op, activation, w_enc.shape[0], w_enc), min(ignored, len(x))


def _decoder(op: str, w_dec: Any, ndim: tuple[int, ...]) -> Tensor | FileRows:
    if isinstance(w_dec, FileRows):
        checks.dimensions(op, "w_dec", w_dec, ndim)
        return w_dec
    w_dec = checks.floats(op, "w_dec", w_dec, ndim, checks.FLOATS)
    checks.rows_contiguous(op, "w_dec", w_dec)
    return w_dec


def _on_device(**tensors: Any) -> dict[str, Tensor]:
    """Tensors among the arguments: rows in a file have no device of their own."""
    return {name: t for name, t in tensors.items() if isinstance(t, Tensor)}


def decode(features: SparseFeatures, w_dec: Any, bias: Any = None) -> tuple[Any, ...]:
    op = "decode"
    w_dec = _decoder(op, w_dec, (2, 3))
    features = compound.features(op, features, w_dec.shape[0])
    named = {"features.value": features.value, "w_dec": w_dec}
    if bias is not None:
        named["bias"] = bias = checks.floats(op, "bias", bias, (1, 2), checks.FLOATS)
        checks.shaped(op, "bias", bias, tuple(w_dec.shape[1:]), "w_dec without its features")
    checks.same_device(op, **_on_device(**named))
    checks.same_kind(op, **named)
    return features, w_dec, bias


def _ragged(op: str, name: str, ragged: Tensor, prefix_ptr: Any) -> tuple[Tensor, int]:
    prefix_ptr, last, longest = checks.offsets(op, "prefix_ptr", prefix_ptr)
    if last != ragged.shape[0]:
        raise ValueError(f"{op}: prefix_ptr must end at the {ragged.shape[0]} rows of {name}, got {last}")
    checks.same_device(op, **{name: ragged, "prefix_ptr": prefix_ptr})
    return prefix_ptr, longest


def attend_back(y: Any, prefix_ptr: Any, attention: Attention, out: Any = None) -> tuple[Any, ...]:
    op = "attend_back"
    y = checks.floats(op, "y", y, (3,), checks.WIDE)
    checks.contiguous(op, "y", y)
    prefix_ptr, longest = _ragged(op, "y", y, prefix_ptr)
    attention = compound.attention(op, attention, y, longest)
    if out is None:
        return y, prefix_ptr, attention, None
    z = checks.floats(op, "out", out, (3,), checks.WIDE)
    checks.shaped(op, "out", z, (y.shape[0], attention.groups, y.shape[2]), "rows x kv heads x width")
    checks.contiguous(op, "out", z)
    checks.same_device(op, y=y, out=z)
    checks.same_kind(op, y=y, out=z)
    attention_tensors = {f"attention.{name}": t for name, t in vars(attention).items()}
    checks.writable(op, "out", out, z.flatten(1), y=y, prefix_ptr=prefix_ptr, **attention_tensors)
    return y, prefix_ptr, attention, z


def edge_scores(gradient: Any, prefix_ptr: Any, features: SparseFeatures, w_dec: Any, out: Any) -> tuple[Any, ...]:
    op = "edge_scores"
    gradient = checks.floats(op, "gradient", gradient, (2,), checks.WIDE)
    checks.rows_contiguous(op, "gradient", gradient)
    w_dec = _decoder(op, w_dec, (2,))
    checks.shaped(op, "w_dec", w_dec, (w_dec.shape[0], gradient.shape[1]), "features x the width of gradient")
    writable = checks.floats(op, "out", out, (2,), checks.WIDE)
    checks.rows_contiguous(op, "out", writable)
    prefix_ptr, _ = _ragged(op, "gradient", gradient, prefix_ptr)
    features = compound.features(op, features, w_dec.shape[0])
    checks.shaped(op, "out", writable, (prefix_ptr.numel() - 1, features.count), "targets x active features")
    named = {"gradient": gradient, "w_dec": w_dec, "features.value": features.value}
    checks.same_device(op, **_on_device(**named, out=writable))
    checks.same_kind(op, **named, out=writable)
    integers = {"prefix_ptr": prefix_ptr, "features.index": features.index, "features.row_ptr": features.row_ptr}
    checks.writable(op, "out", out, writable, **named, **integers)
    return gradient, prefix_ptr, features, w_dec, writable


def influence(rows: Any, node: Any, weight: Any, order: Any = None) -> tuple[Any, ...]:
    op = "influence"
    rows = checks.floats(op, "rows", rows, (2,), checks.WIDE)
    checks.rows_contiguous(op, "rows", rows)
    node = checks.integers(op, "node", node)
    weight = checks.floats(op, "weight", weight, (1,), checks.WIDE)
    stored, named, unit = rows.shape[0], {"rows": rows, "node": node, "weight": weight}, "row"
    if order is not None:
        named["order"] = order = checks.integers(op, "order", order)
        unit = "entry of order"
    shape = (stored if order is None else order.shape[0],)
    checks.shaped(op, "node", node, shape, f"one for each {unit}")
    checks.shaped(op, "weight", weight, shape, f"one for each {unit}")
    checks.same_device(op, **named)
    checks.same_kind(op, rows=rows, weight=weight)
    checks.bounded(op, "node", node, -1, rows.shape[1], f"-1 or a column below {rows.shape[1]}")
    checks.shares(op, "weight", weight)
    if order is not None:
        checks.bounded(op, "order", order, 0, stored, f"from 0 to below {stored}, the rows there are")
    return rows, node, weight, order


CHECKS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "encode": encode,
    "decode": decode,
    "attend_back": attend_back,
    "edge_scores": edge_scores,
    "influence": influence,
}
