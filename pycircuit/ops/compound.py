"""Checks of arguments made of several arrays: features, activations, frozen attention."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import checks
from .activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from .attention import Attention, RecomputedAttention, StoredAttention
from .features import SparseFeatures


def features(op: str, value: Any, size: int) -> SparseFeatures:
    """Features as torch tensors in valid CSR, every index below `size`, the rows of w_dec."""
    if not isinstance(value, SparseFeatures):
        raise TypeError(f"{op}: features must be pc.SparseFeatures, got {type(value).__name__}")
    row_ptr, n, _ = checks.offsets(op, "features.row_ptr", value.row_ptr)
    index = checks.integers(op, "features.index", value.index)
    values = checks.floats(op, "features.value", value.value, (1,), checks.WIDE)
    checks.shaped(op, "features.index", index, (n,), "row_ptr's last entry")
    checks.shaped(op, "features.value", values, (n,), "row_ptr's last entry")
    checks.contiguous(op, "features.value", values)
    checks.same_device(op, **{"features.index": index, "features.row_ptr": row_ptr, "features.value": values})
    checks.bounded(op, "features.index", index, 0, size, f"from 0 to below {size}, the rows of w_dec")
    if row_ptr is value.row_ptr and index is value.index and values is value.value:
        return value
    return SparseFeatures(row_ptr, index, values)


def activation(op: str, value: Any, size: int, like: Tensor) -> Activation:
    """Activation that fits `size` features, its thresholds float32, or float64 as w_enc is."""
    if isinstance(value, ReLU):
        return value
    if isinstance(value, TopK):
        if not isinstance(value.keep_negative, bool):
            raise TypeError(f"{op}: activation.keep_negative must be a bool, got {type(value.keep_negative).__name__}")
        return TopK(checks.whole(op, "activation.k", value.k, 1), value.keep_negative)
    if isinstance(value, BatchTopK):
        return BatchTopK(checks.number(op, "activation.threshold", value.threshold))
    if not isinstance(value, JumpReLU):
        known = "pc.ReLU(), pc.JumpReLU(theta), pc.TopK(k) or pc.BatchTopK(threshold)"
        raise TypeError(f"{op}: activation must be {known}, got {type(value).__name__}")
    if isinstance(value.theta, Real):
        return JumpReLU(checks.number(op, "activation.theta", value.theta))
    theta = checks.floats(op, "activation.theta", value.theta, (0, 1), checks.FLOATS)
    if theta.numel() != 1:
        checks.shaped(op, "activation.theta", theta, (size,), "one for each feature, or a single one")
    checks.same_device(op, w_enc=like, **{"activation.theta": theta})
    checks.without_nan(op, "activation.theta", theta)
    return JumpReLU(theta.to(torch.float64 if like.dtype == torch.float64 else torch.float32))


def attention(op: str, value: Any, y: Tensor, longest: int) -> Attention:
    """Frozen attention that fits the gradient it is applied to, its arrays as tensors."""
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
    pattern = checks.floats(op, "attention.pattern", value.pattern, (3,), checks.WIDE)
    positions, groups = pattern.shape[1], value.kv_heads
    checks.shaped(op, "attention.pattern", pattern, (y.shape[1], positions, positions), "heads of y x positions twice")
    checks.contiguous(op, "attention.pattern", pattern)
    if groups is not None:
        groups = checks.whole(op, "attention.kv_heads", groups, 1)
    checks.same_device(op, y=y, **{"attention.pattern": pattern})
    checks.same_kind(op, y=y, **{"attention.pattern": pattern})
    return value if pattern is value.pattern and groups is value.kv_heads else StoredAttention(pattern, groups)


def _recomputed(op: str, value: RecomputedAttention, y: Tensor) -> RecomputedAttention:
    heads = y.shape[1]
    query = checks.floats(op, "attention.query", value.query, (3,), checks.FLOATS)
    key = checks.floats(op, "attention.key", value.key, (3,), checks.FLOATS)
    normaliser = checks.floats(op, "attention.log_sum_exp", value.log_sum_exp, (2,), checks.WIDE)
    checks.shaped(op, "attention.query", query, (heads, *query.shape[1:]), "heads of y first")
    checks.shaped(op, "attention.key", key, (key.shape[0], *query.shape[1:]), "positions and width of query")
    checks.shaped(op, "attention.log_sum_exp", normaliser, tuple(query.shape[:2]), "heads x positions")
    named = {"attention.query": query, "attention.key": key, "attention.log_sum_exp": normaliser}
    if value.sinks is not None:
        named["attention.sinks"] = checks.floats(op, "attention.sinks", value.sinks, (1,), checks.FLOATS)
        checks.shaped(op, "attention.sinks", named["attention.sinks"], (heads,), "one for each head of y")
    for name, t in named.items():
        checks.contiguous(op, name, t)
    checks.same_device(op, y=y, **named)
    checks.same_kind(op, y=y, **named)
    scale, softcap = (checks.number(op, f"attention.{n}", getattr(value, n)) for n in ("scale", "softcap"))
    for name, number in (("scale", scale), ("softcap", softcap)):
        if not 0 <= number < inf:
            raise ValueError(f"{op}: attention.{name} must be zero or positive and finite, got {number}")
    window = checks.whole(op, "attention.window", value.window, 0)
    sinks = named.get("attention.sinks")
    return RecomputedAttention(query, key, normaliser, scale, softcap, window, sinks)
