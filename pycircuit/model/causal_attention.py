"""Attention of one forward as transformers calls for it: its inputs described, its window read, its output computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycircuit.ops import RecomputedAttention

from .families import FamilyError
from .frozen import attention_block


class Windows:
    """Sliding windows of the masks of one forward, each mask read once: layers of a kind share one mask."""

    def __init__(self) -> None:
        self._of_mask: dict[int, tuple[Tensor, int]] = {}  # a mask that lives keeps its id

    def window(self, mask: Tensor) -> int:
        """Return the window that a mask stands for; 0 if every query sees all before it."""
        if id(mask) not in self._of_mask:
            self._of_mask[id(mask)] = (mask, sliding_window(mask[0, 0]))
        return self._of_mask[id(mask)][1]


def sliding_window(mask: Tensor) -> int:
    """mask: [positions, positions] bool -> its sliding window, or an error if it is not causal."""
    positions = mask.shape[0]
    visible = int(mask[-1].sum())
    window = 0 if visible == positions else visible
    expected = torch.ones_like(mask).tril()
    if window:
        expected = expected.triu(1 - window)
    if not torch.equal(mask, expected):
        raise FamilyError(
            "capture: attention must be causal, with or without a sliding window, got a mask that is neither; "
            "models with chunked or bidirectional attention cannot be traced"
        )
    return window


def layer_of_module(layer_of: Mapping[int, int], owner: nn.Module) -> int:
    """Return the layer that an attention module is in.

    layer_of: the layer of each module's id.
    """
    if id(owner) not in layer_of:
        raise RuntimeError(f"capture: attention must be in a layer that the row names, got {type(owner).__name__}")
    return layer_of[id(owner)]


def attention_inputs(
    owner: nn.Module,
    layer: int,
    query: Tensor,
    key: Tensor,
    options: Mapping[str, Any],
    window: int,
    dtype: torch.dtype,
) -> RecomputedAttention:
    """Attention as transformers calls for it, its log_sum_exp still empty; the heads of all prompts one after another.

    query: [prompts, heads, positions, width]; key: [prompts, kv_heads, positions, width]; options: the keyword
    arguments of transformers' attention functions.
    """
    sinks = options.get("s_aux")
    return RecomputedAttention(
        query=query.flatten(0, 1).to(dtype).contiguous(),
        key=key.flatten(0, 1).to(dtype).contiguous(),
        log_sum_exp=query.new_empty(query.shape[0] * query.shape[1], query.shape[2], dtype=dtype),
        scale=_scale(owner, options.get("scaling"), query.shape[-1], layer),
        softcap=float(options.get("softcap") or 0.0),
        window=window,
        sinks=None if sinks is None else sinks.detach().to(dtype).repeat(query.shape[0]),
    )


def _scale(owner: nn.Module, scaling: float | None, width: int, layer: int) -> float:
    """The factor on logits.

    GPT-2 before transformers 5 passes none and keeps two flags on the module instead.
    """
    if scaling is not None:
        return float(scaling)
    scale = width**-0.5 if getattr(owner, "scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if getattr(owner, "scale_attn_by_inverse_layer_idx", False) else scale


def attend(attention: RecomputedAttention, value: Tensor, pattern: Tensor | None) -> Tensor:
    """Causal attention in blocks of queries; fills in log_sum_exp, and the pattern unless it is None.

    value: [kv_heads, positions, width] -> [heads, positions, width]; pattern: [heads, positions, positions].
    """
    heads, positions, _ = attention.query.shape
    out = value.new_empty(heads, positions, value.shape[2])
    step = max(1, attention_block(value.device) // max(1, heads * positions))
    for begin in range(0, positions, step):
        end = min(begin + step, positions)
        first_key = max(0, begin + 1 - attention.window) if attention.window else 0
        logits = _logits(attention, begin, end, first_key)
        rows = logits.softmax(-1)
        # The largest weight of a row is at least one over its length, so its logarithm is exact enough.
        log_sum_exp = attention.log_sum_exp[:, begin:end]
        log_sum_exp[:] = logits.amax(-1) - rows.amax(-1).log()
        if attention.sinks is not None:
            rows *= (log_sum_exp - attention.with_sinks(log_sum_exp)).exp()[..., None]
        grouped = rows.unflatten(0, (attention.groups, -1))
        out[:, begin:end] = (grouped @ value[:, None, first_key:end]).flatten(0, 1)
        if pattern is not None:
            pattern[:, begin:end, first_key:end] = rows
    return out


def _logits(attention: RecomputedAttention, begin: int, end: int, first_key: int) -> Tensor:
    """Masked logits of queries begin .. end over keys first_key .. end: [heads, end - begin, end - first_key]."""
    query = attention.query[:, begin:end].unflatten(0, (attention.groups, -1))
    key = attention.key[:, None, first_key:end].transpose(-1, -2)
    logits = ((query * attention.scale) @ key).flatten(0, 1)
    if attention.softcap:
        logits = logits.div_(attention.softcap).tanh_().mul_(attention.softcap)
    visible = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).tril(begin - first_key)
    if attention.window:
        visible = visible.triu(begin - first_key + 1 - attention.window)
    return logits.masked_fill_(~visible, -torch.inf)
