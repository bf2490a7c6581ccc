"""attend_back: z[start_t + j, g] = sum over heads h of g and i in j .. length_t - 1 of A_h[i, j] y[start_t + i, h].

Layout: y [rows, heads, width] ragged by target, A [heads, positions, positions] or remade from Q, K, log-sum-exp.
Bytes: y once a block of j below it, A (or Q and K) once a block of columns, z once; a tile of A lives in registers.
Parallel: block of columns (target, width) x block of j x group of heads; sums over heads and i run in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycircuit.kernels.config import Config, config, prune
from pycircuit.kernels.precision import dot
from torch import Tensor

from pycircuit.ops.attention import Attention, RecomputedAttention


def needs(c: Config) -> tuple[int, int]:
    """A stage of y and A, or of y, Q and K; accumulators of z and of one tile of A."""
    return 4 * (c["BI"] * c["BN"] + (c["BI"] + c["BJ"]) * c["BK"]), c["BJ"] * (c["BN"] + c["BI"])


MOST = 40  # accumulators a thread; products in six parts keep as many partial sums beside them
SPACE = prune(
    (
        config(w, s, BJ=j, BI=32, BN=n, BK=32, PRECISION="bf16x6")
        for j in (32, 64)
        for n in (64, 128)
        for w in (4, 8)
        for s in (2, 3)
    ),
    needs,
    MOST,
)

HOPPER = dict.fromkeys(("stored", "recomputed"), config(8, 2, BJ=64, BI=32, BN=128, BK=32, PRECISION="bf16x6"))


@triton.jit
def _tanh(x):
    """Odd series near zero, where the quotient cancels; its next term is below 2^-24 of the sum at 0.3."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    q = x * x
    series = -0.3333333333 + q * (0.1333333333 + q * (-0.05396825397 + q * (0.02186948854 - q * 0.008863235530)))
    return tl.where(tl.abs(x) < 0.3, x + x * q * series, far)


@triton.jit
def _stored(pattern, h, i, j, positions):
    """A_h^T: [j, i], zero above the diagonal, which is not read."""
    cell = pattern + (h * positions + i)[:, None] * positions + j[None, :]
    return tl.trans(tl.load(cell, mask=(j[None, :] <= i[:, None]) & (i < positions)[:, None], other=0.0))


@triton.jit
def _remade(
    query, key, normaliser, h, g, i, j, positions, qk_width, scale, softcap, window,
    BJ: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A_h^T: [j, i] = exp(softcap(scale key[j] . query[i]) - normaliser[i]) where i may look at j."""
    logit = tl.zeros((BJ, BI), tl.float32)
    for k0 in range(0, qk_width, BK):
        k = k0 + tl.arange(0, BK)
        some = k < qk_width
        q = tl.load(query + (h * positions + i)[None, :] * qk_width + k[:, None],
                    mask=some[:, None] & (i < positions)[None, :], other=0.0)  # fmt: skip
        to = tl.load(key + (g * positions + j)[:, None] * qk_width + k[None, :],
                     mask=some[None, :] & (j < positions)[:, None], other=0.0)  # fmt: skip
        logit = dot(to, q, logit, PRECISION)
    logit *= scale
    if SOFTCAP:
        logit = softcap * _tanh(logit / softcap)
    seen = (j[:, None] <= i[None, :]) & (i < positions)[None, :]
    if WINDOW:
        seen &= i[None, :] - j[:, None] < window
    whole = tl.load(normaliser + h * positions + i, mask=i < positions, other=0.0)
    return tl.where(seen, tl.exp(logit - whole[None, :]), 0.0)


# What changes from call to call and aligns nothing is not specialised: it would only compile again.
@triton.jit(do_not_specialize=("targets", "heads", "groups", "window"))
def attend_back_kernel(
    y, prefix_ptr, pattern, query, key, normaliser, z, targets, heads, groups, width, positions, qk_width,
    scale, softcap, window, STORED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BJ: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BN + tl.arange(0, BN)  # targets x width stays below 2^31; a 64-bit quotient is a call
    target, w = column // width, column % width
    start = tl.load(prefix_ptr + target, mask=target < targets, other=0)
    length = tl.load(prefix_ptr + target + 1, mask=target < targets, other=0) - start
    first, g = tl.program_id(1) * BJ, tl.program_id(2).to(tl.int64)
    j = first + tl.arange(0, BJ)
    # 64-bit positions: head x position x position passes 2^31.
    longest = tl.max(length, axis=0).to(tl.int32)
    if WINDOW:
        longest = tl.minimum(longest, first + BJ + window)
    acc = tl.zeros((BJ, BN), tl.float32)
    each = heads // groups
    for h in range(g * each, (g + 1) * each):
        for i0 in range(first, longest, BI):
            i = (i0 + tl.arange(0, BI)).to(tl.int64)
            if STORED:
                a = _stored(pattern, h, i, j, positions)
            else:
                a = _remade(query, key, normaliser, h, g, i, j, positions, qk_width, scale, softcap, window,
                            BJ, BI, BK, SOFTCAP, WINDOW, PRECISION)  # fmt: skip
            cell = y + ((start[None, :] + i[:, None]) * heads + h) * width + w[None, :]
            rows = tl.load(cell, mask=i[:, None] < length[None, :], other=0.0)
            acc = dot(a, rows, acc, PRECISION)
    cell = z + ((start[None, :] + j[:, None]) * groups + g) * width + w[None, :]
    tl.store(cell, acc, mask=j[:, None] < length[None, :])


def shape_class(attention: Attention) -> str:
    return "recomputed" if isinstance(attention, RecomputedAttention) else "stored"


def run(c: Config, y: Tensor, prefix_ptr: Tensor, attention: Attention, out: Tensor | None) -> Tensor:
    (rows, heads, width), targets = y.shape, len(prefix_ptr) - 1
    z = y.new_empty(rows, attention.groups, width) if out is None else out
    if not z.numel():
        return z
    # No longest prefix is fetched from the device: programs past it find nothing to do.
    grid = (triton.cdiv(targets * width, c["BN"]), triton.cdiv(attention.positions, c["BJ"]), attention.groups)
    if isinstance(attention, RecomputedAttention):
        how = (y, attention.query, attention.key, attention.normaliser().float())
        options = (attention.query.shape[2], attention.scale, attention.softcap, attention.window)
    else:
        how, options = (attention.pattern, y, y, y), (0, 0.0, 0.0, 0)
    attend_back_kernel[grid](
        y, prefix_ptr, *how, z, targets, heads, attention.groups, width, attention.positions, *options,
        STORED=shape_class(attention) == "stored", SOFTCAP=options[2] > 0, WINDOW=options[3] > 0, **c.launch(),
    )  # fmt: skip
    return z


def attend_back(y: Tensor, prefix_ptr: Tensor, attention: Attention, out: Tensor | None) -> Tensor:
    with torch.cuda.device_of(y):
        return run(HOPPER[shape_class(attention)], y, prefix_ptr, attention, out)
