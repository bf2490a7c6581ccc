"""Encode and decode with gradients, sparse both ways: nothing is ever tokens x features.

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

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pycircuit import ops
from pycircuit.ops import BatchTopK, SparseFeatures, TopK


@dataclass(eq=False)
class Entries:
    """Which features are looked at where, in CSR by position; `pre` are their pre-activations: [n].

    row_ptr: [positions + 1]; index: [n]; size: how many features there are.
    """

    row_ptr: Tensor
    index: Tensor
    pre: Tensor
    size: int

    @classmethod
    def of(cls, found: SparseFeatures, size: int) -> Entries:
        return cls(found.row_ptr, found.index, found.value, size)

    def at_positions(self, value: Tensor) -> SparseFeatures:
        return SparseFeatures(self.row_ptr, self.index, value)

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """(feature_ptr [size + 1], order [n], position [n]): positions ascend within a feature."""
        order = self.index.argsort(stable=True)
        ptr = self.row_ptr.new_zeros(self.size + 1)
        ptr[1:] = torch.bincount(self.index, minlength=self.size).cumsum(0)
        position = self.at_positions(self.pre).position()
        return ptr, order, position[order]

    def at_features(self, value: Tensor) -> SparseFeatures:
        """The same entries as "positions" that are features and "features" that are positions."""
        ptr, order, position = self._by_feature
        return SparseFeatures(ptr, position, value[order])

    def per_feature(self, value: Tensor) -> Tensor:
        """The sum of an entry's value over every feature's entries: [size]."""
        return value.new_zeros(self.size).index_add_(0, self.index, value)

    def keep(self, chosen: Tensor) -> Entries:
        """Only the entries of a mask [n]."""
        counts = torch.cat([chosen.new_zeros(1, dtype=torch.int64), chosen.cumsum(0)])
        return Entries(counts[self.row_ptr], self.index[chosen], self.pre[chosen], self.size)


class _Encode(torch.autograd.Function):
    """Values of entries already found. theta None: the pre-activations; else those above theta, zero for the others."""

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
            at = theta[entries.index]
            near = (entries.pre - at).abs() < ctx.bandwidth / 2
            grad_theta = entries.per_feature(torch.where(near, -at / ctx.bandwidth * grad_pre, 0))
            grad_pre = torch.where(entries.pre > at, grad_pre, 0)
        grad_x = ops.decode(entries.at_positions(grad_pre), w_enc) if ctx.needs_input_grad[0] else None
        grad_w = ops.decode(entries.at_features(grad_pre), x) if ctx.needs_input_grad[1] else None
        grad_b = entries.per_feature(grad_pre) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b, grad_theta, None, None


class _Decode(torch.autograd.Function):
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
        whole = torch.tensor([0, grad.shape[1]], device=grad.device)
        grad_value, one = value.new_zeros(1, len(value)), entries.at_positions(torch.ones_like(value))
        for slot in range(len(w_dec)):
            ops.edge_scores(grad[slot], whole, one, w_dec[slot], grad_value)
        return grad_value[0], grad_w, None


def values(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, entries: Entries, theta: Tensor | None = None, bandwidth: float = 1.0
) -> Tensor:
    """Values of the entries with their gradients: [n]. x: [positions, width]; w_enc: [features, width].

    With theta [features] (JumpReLU) a step's derivative is taken as a rectangle: theta gets -theta / bandwidth of the
    gradient of every entry within bandwidth / 2 of it, also of those below it, whose value is zero.
    """
    result: Tensor = _Encode.apply(x, w_enc, b_enc, theta, entries, bandwidth)
    return result


def decode(value: Tensor, w_dec: Tensor, entries: Entries) -> Tensor:
    """What the entries write, with its gradients: [slots, positions, width]. w_dec: [slots, features, width]."""
    result: Tensor = _Decode.apply(value, w_dec, entries)
    return result


@torch.no_grad()
def above(x: Tensor, w_enc: Tensor, b_enc: Tensor, theta: Tensor, bandwidth: float) -> Entries:
    """Entries of a JumpReLU and those just below it, which its threshold learns from, by one lowered threshold.

    Its cost and memory grow with what lies above theta - bandwidth / 2: the bandwidth decides how much that is.
    Pre-activations of zero and below are never near.
    """
    lowered = ops.JumpReLU((theta - bandwidth / 2).clamp_min(0.0))
    return Entries.of(ops.encode(x, w_enc, b_enc, lowered), len(w_enc))


@torch.no_grad()
def batch_top_k(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, count: int, guess: float, places: Tensor | None = None
) -> Entries:
    """The `count` largest pre-activations of the whole batch, positive ones only, ties to the earlier entry.

    guess: a threshold they are thought to pass, 0 for none. If too few do, one that they must pass is taken instead:
    the count-th largest among the few largest of each position, which is at most the count-th largest of all.
    places: [positions], where in the batch they are, given where every process holds a part of it; the ranking is
    over all of them, and each keeps its own.
    """
    found = Entries.of(ops.encode(x, w_enc, b_enc, BatchTopK(guess)), len(w_enc)) if guess > 0 else None
    if found is None or _everywhere(len(found.pre), places) < count:
        found = _certain(x, w_enc, b_enc, count)
    ranked, own = (found.pre, slice(None)) if places is None else _gathered(found, places)
    if len(ranked) <= count:
        return found
    best = ranked.argsort(descending=True, stable=True)[:count]
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    chosen[best] = True
    return found.keep(chosen[own])


def _certain(x: Tensor, w_enc: Tensor, b_enc: Tensor, count: int) -> Entries:
    """The `count` largest of these positions are among them."""
    each = min(len(w_enc), 2 * -(-count // max(1, len(x))))
    own = ops.encode(x, w_enc, b_enc, TopK(each)).value
    bound = own.topk(count).values[-1] if len(own) >= count else own.new_zeros(())
    below = float(torch.nextafter(bound, torch.zeros_like(bound)))
    return Entries.of(ops.encode(x, w_enc, b_enc, BatchTopK(below)), len(w_enc))


def _everywhere(count: int, places: Tensor | None) -> int:
    """Over all processes that share the batch."""
    if places is None:
        return count
    total = torch.tensor([count], device=places.device)
    dist.all_reduce(total)
    return int(total)


def _gathered(found: Entries, places: Tensor) -> tuple[Tensor, Tensor]:
    """(every process's pre-activations in the batch's order, where in them this process's own are)."""
    sizes = torch.zeros(dist.get_world_size() + 1, dtype=torch.int64, device=places.device)
    sizes[dist.get_rank() + 1] = len(found.pre)
    dist.all_reduce(sizes)
    begin, end = (int(n) for n in sizes.cumsum(0)[dist.get_rank() :][:2])
    total = int(sizes.sum())
    pre, place = found.pre.new_zeros(total), places.new_zeros(total)
    pre[begin:end], place[begin:end] = found.pre, places[found.at_positions(found.pre).position()]
    for t in (pre, place):
        dist.all_reduce(t)
    order = place.argsort(stable=True)  # a position's entries are one process's, their features ascending
    where = torch.empty_like(order)
    where[order] = torch.arange(total, device=order.device)
    return pre[order], where[begin:end]


def smallest(t: Tensor, places: Tensor | None) -> float:
    """Over all processes that share the batch; infinity where there is nothing."""
    least = t.min() if len(t) else t.new_full((), torch.inf)
    if places is not None:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return float(least)
