"""select: the k largest entries of ragged rows, ties to the lower index, for TopK in encode.

Layout: values of row r at begin[r] .. end[r]; floats become 32-bit keys whose integer order is theirs, NaN on top.
Bytes: a row's first 1,024 entries stay in registers while the k-th key is found bit by bit; later ones are read 32
times. Parallel: one program per row; a second pass in index order drops late entries that tie with the k-th.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycircuit.kernels.config import config
from pycircuit.kernels.launch import launch
from torch import Tensor

from pycircuit.ops.features import SparseFeatures

BLOCK = tl.constexpr(1024)
ROWS = config(4, 1)


@triton.jit
def _key(v):
    """Integer key from 0 to 2^32 - 1 in the order of v; -0 as 0, NaN above inf."""
    bits = tl.where(v == 0, 0.0, v).to(tl.int32, bitcast=True)
    signed = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(v == v, signed.to(tl.int64) + 2147483648, 4294967295)


@triton.jit
def _kth_key(value, begin, end, k):
    """Largest key that at least k entries reach; 0 where there are fewer than k."""
    e = begin + tl.arange(0, BLOCK)
    first = tl.where(e < end, _key(tl.load(value + e, mask=e < end, other=0.0)), -1)  # most rows end here
    largest = tl.zeros((), tl.int64)
    for bit in range(32):
        trial = largest + (tl.full((), 2147483648, tl.int64) >> bit)
        reached = (first >= trial).to(tl.int32)
        for e0 in range(begin + BLOCK, end, BLOCK):
            e = e0 + tl.arange(0, BLOCK)
            key = _key(tl.load(value + e, mask=e < end, other=0.0))
            reached += ((e < end) & (key >= trial)).to(tl.int32)
        largest = tl.where(tl.sum(reached, axis=0) >= k, trial, largest)
    return largest


@triton.jit(do_not_specialize=("k",))
def kth_kernel(value, out, length, k):
    r = tl.program_id(0).to(tl.int64)
    key = _kth_key(value, r * length, (r + 1) * length, k)
    signed = (key - 2147483648).to(tl.int32)
    bits = tl.where(signed < 0, signed ^ 0x7FFFFFFF, signed)
    tl.store(out + r, tl.where(key == 0, -float("inf"), bits.to(tl.float32, bitcast=True)))


@triton.jit(do_not_specialize=("k",))
def keep_kernel(row_ptr, value, keep_mask, kept_counts, k):
    r = tl.program_id(0)
    begin, end = tl.load(row_ptr + r), tl.load(row_ptr + r + 1)
    kth = _kth_key(value, begin, end, k)
    above = tl.zeros((BLOCK,), tl.int32)
    for e0 in range(begin, end, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        key = _key(tl.load(value + e, mask=e < end, other=0.0))
        above += ((e < end) & (key > kth)).to(tl.int32)
    places = k - tl.sum(above, axis=0)
    total, ties = 0, 0
    for e0 in range(begin, end, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        key = _key(tl.load(value + e, mask=e < end, other=0.0))
        tied = ((e < end) & (key == kth)).to(tl.int32)
        earlier = ties + tl.cumsum(tied, axis=0) - tied
        stays = (e < end) & ((key > kth) | ((tied != 0) & (earlier < places)))
        tl.store(keep_mask + e, stays.to(tl.int8), mask=e < end)
        total += tl.sum(stays.to(tl.int32), axis=0)
        ties += tl.sum(tied, axis=0)
    tl.store(kept_counts + r, total)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """k-th largest value of every row, -inf where a row is shorter: [rows]. values: [rows, length], contiguous."""
    out = values.new_empty(len(values))
    launch(kth_kernel, (len(values),), (values, out, values.shape[1], k), ROWS)
    return out


def keep_largest(candidates: SparseFeatures, k: int) -> SparseFeatures:
    """k largest entries of every position, in index order."""
    if not candidates.count:
        return candidates
    keep_mask = torch.empty(candidates.count, dtype=torch.int8, device=candidates.index.device)
    row_ptr = torch.zeros_like(candidates.row_ptr)
    kept_counts = torch.empty(candidates.positions, dtype=torch.int32, device=keep_mask.device)
    launch(
        keep_kernel, (candidates.positions,), (candidates.row_ptr, candidates.value, keep_mask, kept_counts, k), ROWS
    )
    row_ptr[1:] = kept_counts.cumsum(0)
    chosen = keep_mask.bool()
    return SparseFeatures(row_ptr, candidates.index[chosen], candidates.value[chosen])
