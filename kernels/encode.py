"""encode: pre[p, f] = b[f] + x[p] . w[f]; the active (f, pre) of every position, in CSR, indices ascending.

Layout: x [positions, width], w [features, width] by row strides; a tile packs its active entries into a staging buffer.
Bytes: w once per block of positions, x from L2, 12 per tile and position, 8 per active entry staged, 16 written out.
Parallel: tiles of positions x features, one product each; a prefix sum over tiles then gives every entry its place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycircuit.kernels.config import Config, config, prune
from pycircuit.kernels.launch import launch
from pycircuit.kernels.precision import dot
from pycircuit.kernels.select import keep_largest, kth_largest
from torch import Tensor

from pycircuit.ops.activations import Activation, BatchTopK, JumpReLU, TopK
from pycircuit.ops.features import SparseFeatures

ABOVE_NUMBER, ABOVE_VECTOR, ABOVE_KTH = (tl.constexpr(rule) for rule in range(3))
COPY = tl.constexpr(512)  # entries that a tile moves at a time
PRE_ACTIVATIONS_PER_ENTRY = 128  # of the staging buffer; more active entries than fit cost a second run


def needs(c: Config) -> tuple[int, int]:
    return 4 * c["BK"] * (c["BP"] + c["BF"]), c["BP"] * c["BF"]


MAX_ACCUMULATORS = 32  # per thread
SPACE = prune(
    (
        config(w, s, BP=p, BF=f, BK=k)
        for p in (32, 64, 128)
        for f in (64, 128, 256)
        for k in (32, 64)
        for w in (4, 8)
        for s in (2, 3, 4)
    ),
    needs,
    MAX_ACCUMULATORS,
)

# Up to 128 positions the weights are read once. Tiles of 128 x 64 make 256 programs of gemma2b's 16,384 features for
# 132 SMs; 128 x 128 would make 128, but its compaction spills (842 and 1,093 times). Eight warps are two warpgroups of
# 64 rows for wgmma; steps of 64 in bfloat16 load as many bytes as 32 in float32.
HOPPER = {
    "float32_64": config(8, 4, BP=64, BF=64, BK=32),
    "float32": config(8, 3, BP=128, BF=64, BK=32),
    "bfloat16_64": config(4, 4, BP=64, BF=64, BK=64),
    "bfloat16": config(8, 3, BP=128, BF=64, BK=64),
}


@triton.jit
def _pre_activation(
    x,
    w,
    b,
    p,
    f,
    positions,
    features,
    width,
    x_stride,
    w_stride,
    BP: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    acc = tl.zeros((BP, BF), tl.float32)
    x_row = x + p.to(tl.int64)[:, None] * x_stride
    w_row = w + f.to(tl.int64)[None, :] * w_stride
    for k0 in range(0, width, BK):
        k = k0 + tl.arange(0, BK)
        xs = tl.load(x_row + k[None, :], mask=(p < positions)[:, None] & (k < width)[None, :], other=0.0)
        ws = tl.load(w_row + k[:, None], mask=(k < width)[:, None] & (f < features)[None, :], other=0.0)
        acc = dot(xs, ws, acc)
    return acc + tl.load(b + f, mask=f < features, other=0.0).to(tl.float32)[None, :]


# Not specialised: counts that change from call to call and align nothing would only compile again.
@triton.jit(do_not_specialize=("positions", "features", "tiles", "sampled"))
def sample_kernel(
    x,
    w,
    b,
    sample,
    positions,
    features,
    width,
    x_stride,
    w_stride,
    tiles,
    sampled,
    BP: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    """Pre-activations of evenly spread tiles of features: sample [positions, sampled x BF]."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    column = tl.program_id(1) * BF + tl.arange(0, BF)
    f = (tl.program_id(1) * tiles // sampled) * BF + tl.arange(0, BF)
    pre = _pre_activation(x, w, b, p, f, positions, features, width, x_stride, w_stride, BP, BF, BK)
    pre = tl.where((f < features)[None, :], pre, -float("inf"))
    cell = sample + p.to(tl.int64)[:, None] * sampled * BF + column[None, :]
    tl.store(cell, pre, mask=(p < positions)[:, None])


@triton.jit(do_not_specialize=("positions", "features", "ignore", "threshold_stride", "tiles", "capacity"))
def product_kernel(
    x,
    w,
    b,
    threshold,
    staged,
    packed,
    cursor,
    begins,
    counts,
    positions,
    features,
    width,
    ignore,
    x_stride,
    w_stride,
    threshold_stride,
    floor,
    tiles,
    capacity,
    RULE: tl.constexpr,
    FLOOR: tl.constexpr,
    BP: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    """Write the active entries of one tile, row by row, to a range of the staging buffer that it reserves."""
    tile_p, tile_f = tl.program_id(0) % tl.cdiv(positions, BP), tl.program_id(0) // tl.cdiv(positions, BP)
    p, f = tile_p * BP + tl.arange(0, BP), tile_f * BF + tl.arange(0, BF)
    pre = _pre_activation(x, w, b, p, f, positions, features, width, x_stride, w_stride, BP, BF, BK)
    active = ((p >= ignore) & (p < positions))[:, None] & (f < features)[None, :]
    if RULE == ABOVE_VECTOR:  # NaN compares false: it is active under every rule
        theta = tl.load(threshold + f * threshold_stride, mask=f < features, other=0.0)
        active &= ~(pre <= theta[None, :])
    elif RULE == ABOVE_KTH:
        kth = tl.load(threshold + p, mask=p < positions, other=0.0)
        active &= ~(pre < kth[:, None])
    if FLOOR:
        active &= ~(pre <= floor)
    flag = active.to(tl.int32)
    rank, in_row = tl.cumsum(flag, axis=1) - flag, tl.sum(flag, axis=1)
    before = tl.cumsum(in_row, axis=0) - in_row
    # The order of tiles in the staging buffer varies; the counts fix the final place of their entries.
    begin = tl.atomic_add(cursor, tl.sum(in_row, axis=0).to(tl.int64))
    tl.store(begins + tile_p * tiles + tile_f, begin)
    tl.store(counts + p.to(tl.int64) * tiles + tile_f, in_row, mask=p < positions)
    slot = before[:, None] + rank
    active &= slot < tl.minimum(capacity - begin, BP * BF).to(tl.int32)
    code = (tl.arange(0, BP)[:, None] * BF + tl.arange(0, BF)[None, :]) * BF + rank
    tl.store(staged + begin + slot, pre, mask=active)
    tl.store(packed + begin + slot, code, mask=active)


@triton.jit(do_not_specialize=("positions", "tiles"))
def place_kernel(
    staged, packed, begins, counts, ends, index, value, positions, tiles, BP: tl.constexpr, BF: tl.constexpr
):
    """Move the entries of one tile from the staging buffer to their places in the CSR."""
    tile_p, tile_f = tl.program_id(0), tl.program_id(1)
    p = tile_p * BP + tl.arange(0, BP)
    total = tl.sum(tl.load(counts + p.to(tl.int64) * tiles + tile_f, mask=p < positions, other=0), axis=0)
    begin = tl.load(begins + tile_p * tiles + tile_f)
    for e0 in range(0, total, COPY):
        e = e0 + tl.arange(0, COPY)
        code = tl.load(packed + begin + e, mask=e < total, other=0)
        pre = tl.load(staged + begin + e, mask=e < total, other=0.0)
        rank, column, row = code % BF, code // BF % BF, code // (BF * BF)
        cell = (tile_p * BP + row).to(tl.int64) * tiles + tile_f
        end = tl.load(ends + cell, mask=e < total, other=0)
        place = end - tl.load(counts + cell, mask=e < total, other=0) + rank
        tl.store(index + place, (tile_f * BF + column).to(tl.int64), mask=e < total)
        tl.store(value + place, pre, mask=e < total)


def _rule(activation: Activation, like: Tensor, kth: Tensor | None) -> tuple[int, Tensor, int, float, bool]:
    """(rule, threshold, its stride, floor, has a floor)."""
    if isinstance(activation, TopK) and kth is not None:
        return ABOVE_KTH.value, kth, 1, 0.0, not activation.keep_negative
    if isinstance(activation, JumpReLU) and isinstance(activation.theta, Tensor):
        theta = activation.theta.float().reshape(-1).contiguous()
        return ABOVE_VECTOR.value, theta, int(theta.numel() > 1), 0.0, False
    if isinstance(activation, JumpReLU):
        return ABOVE_NUMBER.value, like, 0, float(activation.theta), True
    return (
        ABOVE_NUMBER.value,
        like,
        0,
        max(activation.threshold, 0.0) if isinstance(activation, BatchTopK) else 0.0,
        True,
    )


def _filtered(
    c: Config, x: Tensor, w: Tensor, b: Tensor, activation: Activation, ignore: int, kth: Tensor | None, capacity: int
) -> SparseFeatures:
    """Entries above the threshold; for TopK, those that reach the position's bound."""
    (positions, width), features, device = x.shape, w.shape[0], x.device
    blocks, tiles = triton.cdiv(positions, c["BP"]), triton.cdiv(features, c["BF"])
    rule, threshold, stride, floor, has_floor = _rule(activation, b, kth)
    counts = torch.empty(positions, tiles, dtype=torch.int32, device=device)
    begins = torch.empty(blocks * tiles, dtype=torch.int64, device=device)
    while True:
        staged = torch.empty(capacity, dtype=torch.float32, device=device)
        packed = torch.empty(capacity, dtype=torch.int32, device=device)
        launch(
            product_kernel,
            (blocks * tiles,),
            (
                x,
                w,
                b,
                threshold,
                staged,
                packed,
                begins.new_zeros(1),
                begins,
                counts,
                positions,
                features,
                width,
                ignore,
                x.stride(0),
                w.stride(0),
                stride,
                floor,
                tiles,
                capacity,
            ),
            c,
            RULE=rule,
            FLOOR=has_floor,
        )
        ends = counts.flatten().cumsum(0)
        total = int(ends[-1])  # the only synchronisation: the size of the output
        if total <= capacity:
            break
        capacity = total
    index, value = begins.new_empty(total), staged.new_empty(total)
    if total:
        launch(
            place_kernel,
            (blocks, tiles),
            (staged, packed, begins, counts, ends, index, value, positions, tiles),
            config(4, 1, BP=c["BP"], BF=c["BF"]),
        )
    return SparseFeatures(torch.cat([ends.new_zeros(1), ends.view(positions, tiles)[:, -1]]), index, value)


def _bound(c: Config, x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, int]:
    """(k-th largest of a sample of each position, at most the k-th largest of all; expected entries above it)."""
    (positions, width), features = x.shape, w.shape[0]
    tiles = triton.cdiv(features, c["BF"])
    # A sample of s features lets about k * features / s through: least memory where the two are equal.
    sampled = min(tiles, triton.cdiv(max(k, int((2 * k * features) ** 0.5)), c["BF"]))
    sample = torch.empty(positions, sampled * c["BF"], dtype=torch.float32, device=x.device)
    launch(
        sample_kernel,
        (triton.cdiv(positions, c["BP"]), sampled),
        (x, w, b, sample, positions, features, width, x.stride(0), w.stride(0), tiles, sampled),
        c,
    )
    return kth_largest(sample, k), min(features, 3 * k * tiles // (2 * sampled)) * positions


def shape_class(x: Tensor, w_enc: Tensor) -> str:
    kind = "bfloat16" if w_enc.dtype == torch.bfloat16 else "float32"
    return kind + ("_64" if len(x) <= 64 else "")


def run(
    c: Config, x: Tensor, w_enc: Tensor, b_enc: Tensor, activation: Activation, ignore_positions: int
) -> SparseFeatures:
    positions, features = len(x), len(w_enc)
    if not positions or not features:
        row_ptr = torch.zeros(positions + 1, dtype=torch.int64, device=x.device)
        return SparseFeatures(row_ptr, row_ptr[:0].clone(), torch.empty(0, dtype=torch.float32, device=x.device))
    capacity = positions * features // PRE_ACTIVATIONS_PER_ENTRY + 1024
    if not isinstance(activation, TopK):
        return _filtered(c, x, w_enc, b_enc, activation, ignore_positions, None, capacity)
    if activation.k >= features:
        kth, expected = x.new_full((positions,), -torch.inf, dtype=torch.float32), 0
    else:
        kth, expected = _bound(c, x, w_enc, b_enc, activation.k)
    candidates = _filtered(c, x, w_enc, b_enc, activation, ignore_positions, kth, max(capacity, expected))
    return keep_largest(candidates, activation.k)


def encode(x: Tensor, w_enc: Tensor, b_enc: Tensor, activation: Activation, ignore_positions: int) -> SparseFeatures:
    return run(HOPPER[shape_class(x, w_enc)], x, w_enc, b_enc, activation, ignore_positions)
