"""The five ops in plain PyTorch: what the kernels must equal, in any float type and on any device."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .activations import Activation
from .attention import Attention
from .features import SparseFeatures


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def encode(x: Tensor, w_enc: Tensor, b_enc: Tensor, activation: Activation, ignore_positions: int) -> SparseFeatures:
    pre = torch.addmm(_wide(b_enc), _wide(x), _wide(w_enc).T)
    active = activation.active(pre)
    active[:ignore_positions] = False
    row_ptr = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    row_ptr[1:] = active.sum(1).cumsum(0)
    return SparseFeatures(row_ptr, active.nonzero()[:, 1], pre[active])


def decode(features: SparseFeatures, w_dec: Tensor, bias: Tensor | None) -> Tensor:
    rows = _wide(w_dec[features.index].flatten(1)) * features.value[:, None]
    out = rows.new_zeros(features.positions, rows.shape[1])
    out.index_add_(0, features.position(), rows)
    out = out.view(features.positions, *w_dec.shape[1:]).movedim(0, -2)
    return out.contiguous() if bias is None else out + bias.unsqueeze(-2)


def attend_back(y: Tensor, prefix_ptr: Tensor, attention: Attention, out: Tensor | None) -> Tensor:
    lengths = prefix_ptr.diff().to(y.device)
    longest, (_, heads, width) = int(lengths.max()) if len(lengths) else 0, y.shape
    inside = torch.arange(longest, device=y.device) < lengths[:, None]  # [targets, longest]
    padded = y.new_zeros(len(lengths), longest, heads, width)
    padded[inside] = y
    back = attention.weights(longest).transpose(1, 2)  # [heads, j, i]
    z = back @ padded.permute(2, 1, 0, 3).flatten(2)
    z = z.view(attention.groups, heads // attention.groups, longest, len(lengths), width).sum(1)
    z = z.permute(2, 1, 0, 3)[inside]
    return z if out is None else out.copy_(z)


def edge_scores(gradient: Tensor, prefix_ptr: Tensor, features: SparseFeatures, w_dec: Tensor, out: Tensor) -> Tensor:
    scaled = _wide(w_dec[features.index]) * features.value[:, None]
    starts, lengths = prefix_ptr[:-1].to(gradient.device), prefix_ptr.diff().to(gradient.device)
    bounds = features.row_ptr.tolist()
    for p, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            targets = (lengths > p).nonzero()[:, 0]
            out[targets, begin:end] += gradient[starts[targets] + p] @ scaled[begin:end].T
    return out


def influence(rows: Tensor, node: Tensor, weight: Tensor, order: Tensor | None) -> Tensor:
    share = rows.abs() if order is None else rows[order].abs_()
    if len(misplaced := rows_out_of_order(share, node, None)):
        raise out_of_order(int(misplaced[0]))
    inner = (node >= 0).nonzero()[:, 0]
    share /= share.sum(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    total, entering = rows.new_zeros(rows.shape[1]), weight
    for _ in range(len(node)):  # one pass for every step along a path; NaN would never fade
        if not entering.any():
            break
        step = entering @ share
        total += step
        entering = torch.zeros_like(weight).index_copy_(0, inner, step[node[inner]])
    return total


def rows_out_of_order(rows: Tensor, node: Tensor, order: Tensor | None) -> Tensor:
    """Indices of the rows with an edge to a node whose own row does not come later: [misplaced]."""
    inner = (node >= 0).nonzero()[:, 0]
    edges = rows[:, node[inner]] if order is None else rows[order[:, None], node[inner]]
    not_later = torch.arange(len(node), device=rows.device)[:, None] >= inner
    return ((edges != 0) & not_later).any(1).nonzero()[:, 0]


def out_of_order(row: int) -> ValueError:
    return ValueError(
        "influence: rows must be in layer order, outputs first, then the highest layer, "
        f"got row {row} with an edge to a node whose own row does not come later; sort them, or pass order"
    )
