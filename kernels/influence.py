"""influence: total[c] = sum_r s_r |rows[r, c]|, s_r = (weight_r + total[node_r]) / sum_c |rows[r, c]|, rows in order.

Layout: rows [stored, columns] by row stride, float32; order [count], the stored index of the r-th row, or none: as
stored; s and the entering weights are [count] vectors.
Bytes: rows twice (a row's sum comes before its shares) and rows[:, node], count^2 gathers.
Parallel: sums over rows; then blocks of BR rows one after another, each over blocks of nodes; totals over columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycircuit.kernels.config import Config, config, prune
from pycircuit.kernels.launch import launch
from torch import Tensor

from pycircuit.ops.reference import out_of_order, rows_out_of_order

BR = tl.constexpr(64)  # rows solved at once
BN = tl.constexpr(64)  # nodes per program of the solve
DOUBLINGS = tl.constexpr(6)  # a path inside a block visits at most BR = 2^6 rows
SUM_BLOCK = tl.constexpr(4096)
ROWS = config(4, 2)  # for the sums and the solve


def needs(c: Config) -> tuple[int, int]:
    return 4 * c["BQ"] * c["BC"], c["BQ"] * c["BC"]


MAX_ACCUMULATORS = 64  # per thread
SPACE = prune(
    (config(w, 3, BQ=q, BC=n) for q in (8, 16, 32, 64) for n in (64, 128, 256) for w in (2, 4, 8)),
    needs,
    MAX_ACCUMULATORS,
)

# An H200 takes 5.7 ms for 7,500 rows of 100,000 columns, eight times as long as a copy. 128 columns are whole 512-byte
# lines of a row, 100,000 columns make 782 programs for 132 SMs, and 32 rows in flight are 16 KiB a program. Narrow
# graphs take narrower blocks for more programs.
HOPPER = {"wide": config(4, 3, BQ=32, BC=128), "narrow": config(4, 3, BQ=64, BC=64)}


# The number of columns changes from prompt to prompt.
@triton.jit(do_not_specialize=("columns", "row_stride"))
def sum_kernel(rows, order, weight, entering, row_sum, columns, row_stride, HAS_ORDER: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    stored = tl.load(order + r) if HAS_ORDER else r
    acc = tl.zeros((SUM_BLOCK,), tl.float32)
    for c0 in range(0, columns, SUM_BLOCK):
        c = c0 + tl.arange(0, SUM_BLOCK)
        acc += tl.abs(tl.load(rows + stored * row_stride + c, mask=c < columns, other=0.0))
    tl.store(row_sum + r, tl.maximum(tl.sum(acc, axis=0), 1.1754944e-38))
    tl.store(entering + r, tl.load(weight + r))


@triton.jit
def _stored_row(order, r, count, HAS_ORDER: tl.constexpr):
    """Stored index of row r, below the number of rows: [r]."""
    return tl.load(order + r, mask=r < count, other=0) if HAS_ORDER else r.to(tl.int64)


@triton.jit
def _edges(rows, node, r, stored, n, count, row_stride):
    """Edges of row r, stored at `stored`, to node[n]: [r, n]; zero where there is no such row or n is an output."""
    column = tl.load(node + n, mask=n < count, other=-1)
    mask = (r < count)[:, None] & (column >= 0)[None, :]
    return tl.load(rows + stored[:, None] * row_stride + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=("first", "count", "row_stride"))  # change from call to call and align nothing
def solve_kernel(rows, order, node, entering, row_sum, scale, wrong, first, count, row_stride, HAS_ORDER: tl.constexpr):
    """Solve rows first .. first + BR: s = (I + M + M^2 + ...)^T e, M the edges among them, e the weights that enter."""
    r = first + tl.arange(0, BR)
    stored = _stored_row(order, r, count, HAS_ORDER)
    total = tl.load(row_sum + r, mask=r < count, other=1.0)
    enter = tl.load(entering + r, mask=r < count, other=0.0)
    edges = _edges(rows, node, r, stored, r, count, row_stride)
    within = tl.where(r[:, None] < r[None, :], tl.abs(edges), 0.0) / total[:, None]
    for _ in range(DOUBLINGS):
        enter += tl.sum(within * enter[:, None], axis=0)
        within = tl.dot(within, within, input_precision="ieee")
    pushed_share = enter / total
    if tl.program_id(0) == 0:
        tl.store(scale + r, pushed_share, mask=r < count)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    edges = _edges(rows, node, r, stored, n, count, row_stride)
    if tl.max(((edges != 0) & (r[:, None] >= n[None, :])).to(tl.int32)) > 0:
        tl.store(wrong, 1)
    later = (n >= first + BR) & (n < count)
    pushed = tl.sum(tl.abs(edges) * pushed_share[:, None], axis=0)
    tl.store(entering + n, tl.load(entering + n, mask=later, other=0.0) + pushed, mask=later)


@triton.jit(do_not_specialize=("count", "columns", "row_stride"))
def total_kernel(
    rows,
    order,
    scale,
    out,
    count,
    columns,
    row_stride,
    HAS_ORDER: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    acc = tl.zeros((BQ, BC), tl.float32)
    for r0 in range(0, count, BQ):
        r = r0 + tl.arange(0, BQ)
        share = tl.load(scale + r, mask=r < count, other=0.0)
        row = rows + _stored_row(order, r, count, HAS_ORDER)[:, None] * row_stride + c[None, :]
        acc += share[:, None] * tl.abs(tl.load(row, mask=(r < count)[:, None] & (c < columns)[None, :], other=0.0))
    tl.store(out + c, tl.sum(acc, axis=0), mask=c < columns)


def shape_class(rows: Tensor) -> str:
    return "wide" if rows.shape[1] >= 128 * 132 else "narrow"


def run(c: Config, rows: Tensor, node: Tensor, weight: Tensor, order: Tensor | None) -> Tensor:
    count, columns, stride = len(node), rows.shape[1], rows.stride(0)
    out = rows.new_zeros(columns)
    if not (count and columns):
        return out
    row_order, constants = node if order is None else order, {"HAS_ORDER": order is not None}
    entering, row_sum, scale = rows.new_empty(3, count)
    wrong = torch.zeros(1, dtype=torch.int32, device=rows.device)
    launch(
        sum_kernel,
        (count,),
        (rows, row_order, weight.float().contiguous(), entering, row_sum, columns, stride),
        ROWS,
        **constants,
    )
    for first in range(0, count, BR.value):
        launch(
            solve_kernel,
            (triton.cdiv(count, BN.value),),
            (rows, row_order, node, entering, row_sum, scale, wrong, first, count, stride),
            ROWS,
            **constants,
        )
    launch(
        total_kernel,
        (triton.cdiv(columns, c["BC"]),),
        (rows, row_order, scale, out, count, columns, stride),
        c,
        **constants,
    )
    if int(wrong):
        raise out_of_order(int(rows_out_of_order(rows, node, order)[0]))
    return out


def influence(rows: Tensor, node: Tensor, weight: Tensor, order: Tensor | None) -> Tensor:
    return run(HOPPER[shape_class(rows)], rows, node, weight, order)
