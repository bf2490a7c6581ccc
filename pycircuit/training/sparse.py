"""Encode and decode with gradients, sparse in both directions: no tensor is tokens x features.

Every gradient is one of the ops again. With the entries sorted by feature instead of by position, the sum over
the tokens at which a feature is active is a `decode` whose "decoder" is the batch:

    grad w_dec[f] = sum over entries e of f of value[e] * grad[position[e]]      decode
    grad w_enc[f] = sum over entries e of f of grad_pre[e] * x[position[e]]      decode
    grad value[e] = grad[position[e]] . w_dec[index[e]]                          edge_scores of one target
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pycircuit import ops
from pycircuit.ops import BatchTopK, SparseFeatures, TopK


@dataclass(eq=False)
class Entries:
    """Pairs of position and feature that a step computes, in CSR by position.

    row_ptr: [positions + 1]; index: [n], the feature; pre: [n], its pre-activation; size: the number of features.
    """

    row_ptr: Tensor
    index: Tensor
    pre: Tensor
    size: int

    @classmethod
    def of(cls, features: SparseFeatures, size: int) -> Entries:
        """Entries of an encoding, whose values are pre-activations."""
        return cls(features.row_ptr, features.index, features.value, size)

    def at_positions(self, value: Tensor) -> SparseFeatures:
        """Features with these values [n]."""
        return SparseFeatures(self.row_ptr, self.index, value)

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """(feature_ptr [size + 1], order [n], position [n]): positions ascend within a feature."""
        order = _stable_order(self.index, self.size)
        ptr = self.row_ptr.new_zeros(self.size + 1)
        ptr[1:] = torch.bincount(self.index, minlength=self.size).cumsum(0)
        position = self.at_positions(self.pre).position()
        return ptr, order, position[order]

    def at_features(self, value: Tensor) -> SparseFeatures:
        """Transposed features with these values [n]: their "positions" are features and their "features" positions."""
        ptr, order, position = self._by_feature
        return SparseFeatures(ptr, position, value[order])

    def per_feature(self, value: Tensor) -> Tensor:
        """Sum of the values over each feature's entries: [size]."""
        return value.new_zeros(self.size).index_add_(0, self.index, value)

    def select(self, mask: Tensor) -> Entries:
        """Entries of a mask [n]."""
        counts = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
        return Entries(counts[self.row_ptr], self.index[mask], self.pre[mask], self.size)


def _stable_order(index: Tensor, size: int) -> Tensor:
    """Order that sorts indices below `size`, equal ones as they come: [n]."""
    if index.device.type != "cpu" or size > 1 << 16:
        return index.argsort(stable=True)
    # NumPy sorts 16-bit integers by their digits, torch compares 64-bit ones: 0.3 against 3 ms for 32,768.
    return torch.from_numpy(np.argsort(index.numpy().astype(np.uint16), kind="stable"))


class _Encode(torch.autograd.Function):
    """Values of entries: their pre-activations; with theta, those above it, and zero for the others."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_enc: Tensor, b_enc: Tensor, theta: Tensor | None, entries: Entries, bandwidth: float
    ) -> Tensor:
        ctx.entries, ctx.bandwidth = entries, bandwidth
        ctx.save_for_backward(x, w_enc, theta)
        if theta is None:
            return entries.pre.clone()
        return torch.where(entries.pre > theta[entries.index], entries.pre, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w_enc, theta = ctx.saved_tensors
        entries, grad_theta = ctx.entries, None
        grad_pre = grads[0].contiguous()
        if theta is not None:
            threshold = theta[entries.index]
            near = (entries.pre - threshold).abs() < ctx.bandwidth / 2
            grad_theta = entries.per_feature(torch.where(near, -threshold / ctx.bandwidth * grad_pre, 0))
            grad_pre = torch.where(entries.pre > threshold, grad_pre, 0)
        grad_x = ops.decode(entries.at_positions(grad_pre), w_enc) if ctx.needs_input_grad[0] else None
        grad_w = ops.decode(entries.at_features(grad_pre), x) if ctx.needs_input_grad[1] else None
        grad_b = entries.per_feature(grad_pre) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b, grad_theta, None, None


class _Decode(torch.autograd.Function):
    """Reconstruction of entries with these values: [slots, positions, width]."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, w_dec: Tensor, entries: Entries) -> Tensor:
        ctx.entries = entries
        ctx.save_for_backward(value, w_dec)
        return ops.decode(entries.at_positions(value), w_dec.transpose(0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value, w_dec = ctx.saved_tensors
        grad, entries = grads[0].contiguous(), ctx.entries
        grad_w = ops.decode(entries.at_features(value), grad.transpose(0, 1)) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_w, None
        prefix_ptr = torch.tensor([0, grad.shape[1]], device=grad.device)  # one target: every position
        ones = entries.at_positions(torch.ones_like(value))
        grad_value = value.new_zeros(1, len(value))
        for slot in range(len(w_dec)):
            ops.edge_scores(grad[slot], prefix_ptr, ones, w_dec[slot], grad_value)
        return grad_value[0], grad_w, None


def values(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, entries: Entries, theta: Tensor | None = None, bandwidth: float = 1.0
) -> Tensor:
    """Values of the entries, with gradients: [n]. x: [positions, width]; w_enc: [features, width].

    With theta [features] (JumpReLU) the derivative of a step is a rectangle: theta gets -theta / bandwidth of the
    gradient of every entry within bandwidth / 2 of it, also of those below it, whose value is zero.
    """
    result: Tensor = _Encode.apply(x, w_enc, b_enc, theta, entries, bandwidth)
    return result


def decode(value: Tensor, w_dec: Tensor, entries: Entries) -> Tensor:
    """Reconstruction of the entries, with its gradients: [slots, positions, width]. w_dec: [slots, features, width]."""
    result: Tensor = _Decode.apply(value, w_dec, entries)
    return result


@torch.no_grad()
def above(x: Tensor, w_enc: Tensor, b_enc: Tensor, theta: Tensor, bandwidth: float) -> Entries:
    """Entries above theta - bandwidth / 2: those of a JumpReLU, and those just below that its threshold learns from.

    Cost and memory grow with their number, so with the bandwidth. Pre-activations of zero and below are never among
    them.
    """
    lowered = ops.JumpReLU((theta - bandwidth / 2).clamp_min(0.0))
    return Entries.of(ops.encode(x, w_enc, b_enc, lowered), len(w_enc))


@torch.no_grad()
def batch_top_k(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, count: int, guess: float, batch_index: Tensor | None = None
) -> Entries:
    """Entries of the `count` largest pre-activations of the batch, positive ones only, ties to the earlier entry.

    guess: a threshold that `count` entries are expected to pass, 0 for none. If fewer pass it, a safe one is used: the
    count-th largest among the few largest of each position, which is at most the count-th largest of all.
    batch_index: [positions], each position's index in the batch, for processes that share it; the ranking is over
    the batch of all processes, and each returns its own entries.
    """
    entries = Entries.of(ops.encode(x, w_enc, b_enc, BatchTopK(guess)), len(w_enc)) if guess > 0 else None
    if entries is None or _total(len(entries.pre), batch_index) < count:
        entries = _superset(x, w_enc, b_enc, count)
    ranked = entries.pre
    own: Tensor | slice = slice(None)
    if batch_index is not None:
        ranked, own = _gathered(entries, batch_index)
    if len(ranked) <= count:
        return entries
    best = ranked.argsort(descending=True, stable=True)[:count]
    mask = torch.zeros_like(ranked, dtype=torch.bool)
    mask[best] = True
    return entries.select(mask[own])


def _superset(x: Tensor, w_enc: Tensor, b_enc: Tensor, count: int) -> Entries:
    """Entries that include the `count` largest of these positions."""
    k = min(len(w_enc), 2 * -(-count // max(1, len(x))))
    largest = ops.encode(x, w_enc, b_enc, TopK(k)).value
    bound = largest.topk(count).values[-1] if len(largest) >= count else largest.new_zeros(())
    below = float(torch.nextafter(bound, torch.zeros_like(bound)))
    return Entries.of(ops.encode(x, w_enc, b_enc, BatchTopK(below)), len(w_enc))


def _total(count: int, batch_index: Tensor | None) -> int:
    """Sum of the counts of all processes that share the batch."""
    if batch_index is None:
        return count
    total = torch.tensor([count], device=batch_index.device)
    dist.all_reduce(total)
    return int(total)


def _gathered(entries: Entries, batch_index: Tensor) -> tuple[Tensor, Tensor]:
    """(pre-activations of all processes in the batch's order, indices into them of this process's entries)."""
    sizes = torch.zeros(dist.get_world_size() + 1, dtype=torch.int64, device=batch_index.device)
    sizes[dist.get_rank() + 1] = len(entries.pre)
    dist.all_reduce(sizes)
    begin, end = (int(n) for n in sizes.cumsum(0)[dist.get_rank() :][:2])
    total = int(sizes.sum())
    pre = entries.pre.new_zeros(total)
    pre[begin:end] = entries.pre
    owner = batch_index.new_zeros(total)  # the batch index of each entry
    owner[begin:end] = batch_index[entries.at_positions(entries.pre).position()]
    for t in (pre, owner):
        dist.all_reduce(t)
    order = owner.argsort(stable=True)  # a position's entries are one process's, their features ascending
    rank = torch.empty_like(order)
    rank[order] = torch.arange(total, device=order.device)
    return pre[order], rank[begin:end]


def smallest(t: Tensor, batch_index: Tensor | None) -> float:
    """Minimum over all processes that share the batch; infinity if there are no numbers."""
    least = t.min() if len(t) else t.new_full((), torch.inf)
    if batch_index is not None:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return float(least)
