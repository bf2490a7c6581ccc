"""attend_back: z[start_t + j, g] = sum over heads h of g and i in j .. length_t - 1 of A_h[i, j] y[start_t + i, h].

Layout: y [rows, heads, width] ragged by target, A [heads, positions, positions]. A recomputed pattern is first written
from Q, K and log-sum-exp to scratch memory [heads, positions, columns], as many columns at a time as fit in it.
Bytes: y once per block of j at or below it; A once per target and block of width, all but the first from cache; z once.
Parallel: (target, block of width) x block of j x group of heads, the heads of a group and i summed in order;
a pattern by blocks of j x blocks of i x head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycircuit.kernels.config import Config, config, prune
from pycircuit.kernels.launch import launch
from pycircuit.kernels.precision import dot
from torch import Tensor

from pycircuit.ops.attention import Attention, RecomputedAttention, StoredAttention, scratch_columns


def needs(c: Config) -> tuple[int, int]:
    """Shared bytes of a stage of y and A; accumulators of z and of a tile's sum."""
    return 4 * c["BI"] * (c["BJ"] + c["BN"]), 2 * c["BJ"] * c["BN"]


MAX_ACCUMULATORS = 128  # per thread
# All compile without a spill, also where rows of a pattern are not aligned. With 8 warps and 128 columns one program
# fits an SM, with the others two to four.
SPACE = prune(
    (
        config(w, s, BJ=j, BI=i, BN=n)
        for w, s, j, i, n in (
            (8, 2, 128, 64, 128),
            (4, 2, 64, 32, 64),
            (8, 2, 128, 32, 64),
            (4, 2, 64, 16, 128),
            (8, 3, 128, 32, 128),
            (4, 2, 64, 64, 64),
            (4, 3, 64, 32, 64),
            (8, 2, 128, 32, 128),
        )
    ),
    needs,
    MAX_ACCUMULATORS,
)

# The fastest of the space on an H200: 0.170 ms at 128 positions and 256 targets, 2.03 ms at 2,300 and 32.
SHORT = 512  # positions
HOPPER = {
    "short": config(4, 3, BJ=64, BI=32, BN=64),
    "long": config(8, 3, BJ=128, BI=32, BN=128),
}
PATTERN = {
    torch.float32: config(8, 2, BI=128, BJ=128, BK=32),
    torch.bfloat16: config(8, 3, BI=128, BJ=128, BK=64),
}


@triton.jit
def _tanh(x):
    """tanh, by its odd series near zero, where the quotient cancels; the next term at 0.3 is below 2^-24 of the sum."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    q = x * x
    series = -0.3333333333 + q * (0.1333333333 + q * (-0.05396825397 + q * (0.02186948854 - q * 0.008863235530)))
    return tl.where(tl.abs(x) < 0.3, x + x * q * series, far)


@triton.jit
def _longest(prefix_ptr, targets):
    longest = tl.zeros((), tl.int64)
    for t0 in range(0, targets, 256):
        t = t0 + tl.arange(0, 256)
        start = tl.load(prefix_ptr + t, mask=t < targets, other=0)
        end = tl.load(prefix_ptr + t + 1, mask=t < targets, other=0)
        longest = tl.maximum(longest, tl.max(end - start, axis=0))
    return longest


@triton.jit(do_not_specialize=("targets", "heads", "groups", "positions", "first_column", "window"))
def pattern_kernel(
    query,
    key,
    normaliser,
    prefix_ptr,
    pattern,
    targets,
    heads,
    groups,
    positions,
    qk_width,
    pitch,
    first_column,
    scale,
    softcap,
    window,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
):
    """pattern[h, i, j - first_column] = exp(softcap(scale query[h, i] . key[g, j]) - normaliser[h, i]).

    Tiles that no target reaches are not written; attend_back_kernel applies the mask.
    """
    column, first, h = tl.program_id(0) * BJ, tl.program_id(1) * BI, tl.program_id(2)
    behind = first - (first_column + column)
    reached = (behind > -BI) & (first < _longest(prefix_ptr, targets))
    if WINDOW:
        reached &= behind - BJ < window - 1
    if reached:
        row, j, k = tl.arange(0, BI), tl.arange(0, BJ), tl.arange(0, BK)
        i_inside, j_inside = first + row < positions, first_column + column + j < positions
        # 64-bit offsets of a tile: head x position x position passes 2^31.
        query += (h.to(tl.int64) * positions + first) * qk_width
        key += ((h // (heads // groups)).to(tl.int64) * positions + first_column + column) * qk_width
        logit = tl.zeros((BI, BJ), tl.float32)
        for k0 in range(0, qk_width, BK):
            k_inside = k0 + k < qk_width
            q_tile = tl.load(
                query + row[:, None] * qk_width + (k0 + k)[None, :],
                mask=i_inside[:, None] & k_inside[None, :],
                other=0.0,
            )
            k_tile = tl.load(
                key + j[:, None] * qk_width + (k0 + k)[None, :], mask=j_inside[:, None] & k_inside[None, :], other=0.0
            )
            logit = dot(q_tile, tl.trans(k_tile), logit)
        logit *= scale
        if SOFTCAP:
            logit = softcap * _tanh(logit / softcap)
        logit -= tl.load(normaliser + h * positions + first + row, mask=i_inside, other=0.0)[:, None]
        cell = pattern + (h.to(tl.int64) * positions + first) * pitch + column + row[:, None] * pitch + j[None, :]
        tl.store(cell, tl.exp(logit), mask=i_inside[:, None] & (column + j < pitch)[None, :])


# Not specialised: values that change from call to call and align nothing would only compile again.
@triton.jit(do_not_specialize=("heads", "groups", "positions", "first_column", "window"))
def attend_back_kernel(
    y,
    prefix_ptr,
    pattern,
    z,
    heads,
    groups,
    width,
    positions,
    pitch,
    first_column,
    window,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    BJ: tl.constexpr,
    BI: tl.constexpr,
    BN: tl.constexpr,
):
    """z of the positions from first_column on, the first column of pattern [heads, positions, pitch]."""
    blocks = tl.cdiv(width, BN)
    target, n0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BN
    column, g = tl.program_id(1) * BJ, tl.program_id(2)
    start = tl.load(prefix_ptr + target)
    length = (tl.load(prefix_ptr + target + 1) - start).to(tl.int32)
    first = first_column + column
    if first < length:
        row, j, n = tl.arange(0, BI), tl.arange(0, BJ), tl.arange(0, BN)
        j_inside, n_inside = column + j < pitch, n0 + n < width
        end, heads_of_group = length, heads // groups
        if WINDOW:
            end = tl.minimum(end, first + BJ + window - 1)
        steps = tl.cdiv(end - first, BI)
        acc = tl.zeros((BJ, BN), tl.float32)
        for step in range(heads_of_group * steps):  # one loop over heads and i, loads run ahead across heads
            h, i0 = g * heads_of_group + step // steps, first + step % steps * BI
            i_inside = i0 + row < end
            # 64-bit offsets of a tile: head x position x position passes 2^31.
            cell = pattern + (h.to(tl.int64) * positions + i0) * pitch + column + row[:, None] * pitch + j[None, :]
            a = tl.load(cell, mask=i_inside[:, None] & j_inside[None, :], other=0.0)
            behind = (i0 + row)[:, None] - (first + j)[None, :]
            seen = behind >= 0
            if WINDOW:
                seen &= behind < window
            cell = y + ((start + i0) * heads + h) * width + n0 + row[:, None] * (heads * width) + n[None, :]
            y_tile = tl.load(cell, mask=i_inside[:, None] & n_inside[None, :], other=0.0)
            acc = dot(tl.trans(tl.where(seen, a, 0.0)), y_tile, acc, PARTS)
        cell = z + ((start + first) * groups + g) * width + n0 + j[:, None] * (groups * width) + n[None, :]
        tl.store(cell, acc, mask=(first + j < length)[:, None] & n_inside[None, :])


def shape_class(attention: Attention) -> str:
    return "short" if attention.positions <= SHORT else "long"


def write_pattern(attention: RecomputedAttention, prefix_ptr: Tensor, first_column: int, pattern: Tensor) -> None:
    """Fill pattern [heads, positions, columns] with the columns from first_column on, where a prefix reaches."""
    c, (heads, positions, columns) = PATTERN[attention.query.dtype], pattern.shape
    grid = (triton.cdiv(columns, c["BJ"]), triton.cdiv(positions, c["BI"]), heads)
    launch(
        pattern_kernel,
        grid,
        (
            attention.query,
            attention.key,
            attention.normaliser.float(),
            prefix_ptr,
            pattern,
            len(prefix_ptr) - 1,
            heads,
            attention.groups,
            positions,
            attention.query.shape[2],
            columns,
            first_column,
            attention.scale,
            attention.softcap,
            attention.window,
        ),
        c,
        SOFTCAP=attention.softcap > 0,
        WINDOW=attention.window > 0,
    )


def apply_pattern(
    c: Config, y: Tensor, prefix_ptr: Tensor, pattern: Tensor, first_column: int, window: int, z: Tensor, parts: int
) -> None:
    """Fill the positions of z whose columns are in pattern [heads, positions, columns]."""
    (heads, positions, columns), (_, groups, width), targets = pattern.shape, z.shape, len(prefix_ptr) - 1
    # No longest prefix is fetched from the device: programs past it find nothing to do.
    grid = (targets * triton.cdiv(width, c["BN"]), triton.cdiv(columns, c["BJ"]), groups)
    launch(
        attend_back_kernel,
        grid,
        (y, prefix_ptr, pattern, z, heads, groups, width, positions, columns, first_column, window),
        c,
        WINDOW=window > 0,
        PARTS=parts,
    )


def run(c: Config, y: Tensor, prefix_ptr: Tensor, attention: Attention, out: Tensor | None, parts: int = 3) -> Tensor:
    z = y.new_empty(y.shape[0], attention.groups, y.shape[2]) if out is None else out
    if not z.numel():
        return z
    if isinstance(attention, StoredAttention):
        apply_pattern(c, y, prefix_ptr, attention.pattern, 0, 0, z, parts)
        return z
    heads, positions = attention.heads, attention.positions
    pattern = y.new_empty(heads, positions, scratch_columns(heads, positions))
    for first_column in range(0, positions, pattern.shape[2]):
        write_pattern(attention, prefix_ptr, first_column, pattern)
        apply_pattern(c, y, prefix_ptr, pattern, first_column, attention.window, z, parts)
    return z


def attend_back(y: Tensor, prefix_ptr: Tensor, attention: Attention, out: Tensor | None, parts: int = 3) -> Tensor:
    """The op; parts: how many bfloat16 parts of each number are multiplied, 3 for float32's accuracy."""
    return run(HOPPER[shape_class(attention)], y, prefix_ptr, attention, out, parts)
