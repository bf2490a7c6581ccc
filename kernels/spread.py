"""spread: gradients below a target's first attention, from one vector a head and the pattern's row of its position.

out[start_t + j] = (sum over heads h of pattern[h, query_t, j] / column_sigma[j] vectors[h, t]
                    + vectors[heads, t] where j is the target's own position) / row_sigma[j]

Layout: vectors [heads + 1, targets, width] contiguous, pattern [heads, queries, keys] by strides, out [rows, width] by
row stride, ragged by target. Bytes: out once; vectors once per block of j, all but the first from cache.
Parallel: target x block of the width x block of j.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pycircuit.kernels.config import config
from pycircuit.kernels.launch import launch
from torch import Tensor

# 16 accumulators a thread leave room for two or three programs an SM, which keep the stores busy; a row of a block is
# 512 bytes, four whole lines of memory.
BLOCK = config(8, 1, BJ=32, BN=128)


# Not specialised: what changes from tile to tile or prompt to prompt and would only compile again.
@triton.jit(
    do_not_specialize=("head_stride", "query_stride"),
    do_not_specialize_on_alignment=("pattern", "query", "column_sigma", "row_sigma", "prefix_ptr"),
)
def spread_kernel(
    vectors,
    pattern,
    query,
    column_sigma,
    row_sigma,
    prefix_ptr,
    out,
    heads,
    width,
    vector_stride,
    head_stride,
    query_stride,
    out_stride,
    HAS_QUERY: tl.constexpr,
    HAS_COLUMN_SIGMA: tl.constexpr,
    HAS_ROW_SIGMA: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(width, BN)
    t, n = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    start, end = tl.load(prefix_ptr + t), tl.load(prefix_ptr + t + 1)
    length = (end - start).to(tl.int32)
    if tl.program_id(1) * BJ < length:
        j = tl.program_id(1) * BJ + tl.arange(0, BJ)
        seen, inside = j < length, n < width
        q = tl.load(query + t) if HAS_QUERY else t
        share = pattern + q * query_stride + j
        vector = vectors + t * width + n
        acc = tl.zeros((BJ, BN), tl.float32)
        for _ in range(heads):
            a = tl.load(share, mask=seen, other=0.0)
            acc += a[:, None] * tl.load(vector, mask=inside, other=0.0)[None, :]
            share += head_stride
            vector += vector_stride
        if HAS_COLUMN_SIGMA:
            acc /= tl.load(column_sigma + j, mask=seen, other=1.0)[:, None]
        own = tl.load(vector, mask=inside, other=0.0)
        acc += tl.where((j == length - 1)[:, None], own[None, :], 0.0)
        if HAS_ROW_SIGMA:
            acc /= tl.load(row_sigma + j, mask=seen, other=1.0)[:, None]
        row = start - tl.load(prefix_ptr) + j
        tl.store(out + row[:, None] * out_stride + n[None, :], acc, mask=seen[:, None] & inside[None, :])


def spread(
    vectors: Tensor,
    pattern: Tensor,
    query: Tensor | None,
    column_sigma: Tensor | None,
    row_sigma: Tensor | None,
    prefix_ptr: Tensor,
    longest: int,
    out: Tensor,
) -> None:
    """Write the rows of every target to out [rows, width].

    query: [targets], rows of the pattern, None for one a target in their order; prefix_ptr: [targets + 1], from any
    start; longest: at least the rows of the target that has the most.
    """
    heads, (_, targets, width) = len(vectors) - 1, vectors.shape
    if not out.numel():
        return
    grid = (targets * triton.cdiv(width, BLOCK["BN"]), triton.cdiv(longest, BLOCK["BJ"]))
    launch(
        spread_kernel,
        grid,
        (
            vectors,
            pattern,
            prefix_ptr if query is None else query,
            vectors if column_sigma is None else column_sigma,
            vectors if row_sigma is None else row_sigma,
            prefix_ptr,
            out,
            heads,
            width,
            vectors.stride(0),
            pattern.stride(0),
            pattern.stride(1),
            out.stride(0),
        ),
        BLOCK,
        HAS_QUERY=query is not None,
        HAS_COLUMN_SIGMA=column_sigma is not None,
        HAS_ROW_SIGMA=row_sigma is not None,
    )
