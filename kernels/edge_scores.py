"""edge_scores: out[t, e] += value[e] * gradient[start_t + p] . w_dec[index[e]], p the position of e, if p < length_t.

Layout: gradient [rows, width] ragged by target, w_dec [features, width] and out [targets, entries] by row strides.
Bytes: gradient once per block of entries of its position, w_dec rows in place once per block of targets, out twice.
Parallel: position x block of targets x share of the position's blocks of entries; no element has two writers. Blocks of
targets come first, so that a position's rows of w_dec are read from memory once. Where every position has one entry,
there is no matrix product: each row of the gradient is multiplied by one row of w_dec. Features of several layers take
one launch: a position has the entries of each layer in turn, each with the address of its row of w_dec and its column.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from pycircuit.kernels.config import Config, config, prune
from pycircuit.kernels.launch import launch
from pycircuit.kernels.precision import dot
from torch import Tensor

from pycircuit.ops import checks
from pycircuit.ops.cross_layer import UNIT, CrossLayerFeatures
from pycircuit.ops.features import SparseFeatures


def needs(c: Config) -> tuple[int, int]:
    return 4 * c["BK"] * (c["BT"] + c["BE"]), c["BT"] * c["BE"]


MAX_ACCUMULATORS = 32  # per thread
# In float32 all but the last compile without a spill; with four warps two programs fit an SM.
SPACE = prune(
    (
        config(w, s, BT=t, BE=e, BK=k, SHARES=shares)
        for w, s, t, e, k in (
            (8, 3, 64, 64, 32),
            (4, 2, 64, 32, 32),
            (4, 4, 64, 32, 16),
            (8, 3, 128, 32, 32),
            (4, 3, 64, 32, 32),
            (8, 4, 64, 64, 16),
            (4, 2, 128, 32, 32),
            (8, 3, 64, 64, 64),
        )
        for shares in (1, 4)
    ),
    needs,
    MAX_ACCUMULATORS,
)

# The fastest of the space on an H200 at gemma2b, where a position has about 60 active features: 0.235 ms with 256
# targets where blocks of 64 x 64 take 0.259. Entries are shared out over programs only when positions alone are too few
# to fill the card.
HOPPER = {
    "float32": config(8, 3, BT=128, BE=32, BK=32, SHARES=1),
    "float32_few_positions": config(8, 3, BT=128, BE=32, BK=32, SHARES=4),
    "bfloat16": config(4, 3, BT=64, BE=32, BK=32, SHARES=1),
    "bfloat16_few_positions": config(4, 3, BT=64, BE=32, BK=32, SHARES=4),
}
_one_each: WeakKeyDictionary[SparseFeatures, bool] = WeakKeyDictionary()
ONE_EACH = config(8, 1, BP=8, BK=256)  # BP entries per program, BK columns of their rows at a time


# Not specialised: the number of targets and of columns changes from call to call and would only compile again; with it
# columns of `out` and a layer's features are aligned by chance.
@triton.jit(
    do_not_specialize=("targets", "shift", "out_stride"),
    do_not_specialize_on_alignment=("out", "value", "index", "column", "row_ptr", "ends", "prefix_ptr"),
)
def edge_scores_kernel(
    gradient,
    prefix_ptr,
    row_ptr,
    ends,
    index,
    value,
    column,
    w_dec,
    out,
    targets,
    width,
    shift,
    g_stride,
    w_stride,
    out_stride,
    SEVERAL: tl.constexpr,
    PARTS: tl.constexpr,
    SHARES: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
):
    blocks = tl.cdiv(targets, BT)
    p = tl.program_id(0) // blocks
    t = tl.program_id(0) % blocks * BT + tl.arange(0, BT)
    start = tl.load(prefix_ptr + t, mask=t < targets, other=0)
    reaches = tl.load(prefix_ptr + t + 1, mask=t < targets, other=0) > start + p
    begin, end = tl.load(row_ptr + p), tl.load(ends + p)
    if tl.max(reaches.to(tl.int32), axis=0) == 0:
        end = begin
    g_row = gradient + (start + p)[:, None] * g_stride
    for e0 in range(begin + tl.program_id(1) * BE, end, BE * SHARES):
        e = e0 + tl.arange(0, BE)
        place = tl.load(index + e, mask=e < end, other=0)
        if SEVERAL:
            place += shift
        w_row = w_dec + place[None, :] * w_stride
        acc = tl.zeros((BT, BE), tl.float32)
        for k0 in range(0, width, BK):
            k = k0 + tl.arange(0, BK)
            g = tl.load(g_row + k[None, :], mask=reaches[:, None] & (k < width)[None, :], other=0.0)
            w = tl.load(w_row + k[:, None], mask=(k < width)[:, None] & (e < end)[None, :], other=0.0)
            acc = dot(g, w, acc, PARTS)
        scale = tl.load(value + e, mask=e < end, other=0.0)
        # prefix_ptr starts at 0. Reading it keeps the addresses below out of registers during the product.
        row = t + tl.load(prefix_ptr, volatile=True)
        if SEVERAL:  # noqa: SIM108 - a choice at compile time, not a select
            e_out = tl.load(column + e, mask=e < end, other=0)
        else:
            e_out = e
        cell = out + row[:, None] * out_stride + e_out[None, :]
        mask = reaches[:, None] & (e < end)[None, :]
        tl.store(cell, tl.load(cell, mask=mask, other=0.0) + acc * scale[None, :], mask=mask)


@triton.jit(do_not_specialize=("out_stride",), do_not_specialize_on_alignment=("out", "value", "index", "prefix_ptr"))
def one_each_kernel(
    gradient,
    prefix_ptr,
    index,
    value,
    w_dec,
    out,
    width,
    g_stride,
    w_stride,
    out_stride,
    BP: tl.constexpr,
    BK: tl.constexpr,
):
    """Entry p belongs to position p: out[t, p] += value[p] * gradient[start_t + p] . w_dec[index[p]]."""
    t, p = tl.program_id(0).to(tl.int64), tl.program_id(1) * BP + tl.arange(0, BP)
    start = tl.load(prefix_ptr + t)
    seen = p < tl.load(prefix_ptr + t + 1) - start
    g_row = gradient + (start + p)[:, None] * g_stride
    w_row = w_dec + tl.load(index + p, mask=seen, other=0)[:, None] * w_stride
    acc = tl.zeros((BP, BK), tl.float32)
    for k0 in range(0, width, BK):
        k = k0 + tl.arange(0, BK)[None, :]
        inside = seen[:, None] & (k < width)
        g, w = tl.load(g_row + k, mask=inside, other=0.0), tl.load(w_row + k, mask=inside, other=0.0)
        acc += g * w.to(tl.float32)
    cell = out + t * out_stride + p
    scale = tl.load(value + p, mask=seen, other=0.0)
    tl.store(cell, tl.load(cell, mask=seen, other=0.0) + tl.sum(acc, axis=1) * scale, mask=seen)


def shape_class(positions: int, targets: int, w_dec: Tensor) -> str:
    kind = "bfloat16" if w_dec.dtype == torch.bfloat16 else "float32"
    return kind + ("_few_positions" if positions * triton.cdiv(targets, 64) < 132 else "")


def run(
    c: Config,
    gradient: Tensor,
    prefix_ptr: Tensor,
    features: SparseFeatures,
    w_dec: Tensor,
    out: Tensor,
    parts: int = 3,
) -> Tensor:
    if out.numel() and len(gradient):
        ends = features.row_ptr[1:]
        entries = (features.row_ptr, ends, features.index, features.value, features.index)
        _launch(c, gradient, prefix_ptr, entries, w_dec, out, 0, w_dec.stride(0), False, parts)
    return out


def _launch(
    c: Config,
    gradient: Tensor,
    prefix_ptr: Tensor,
    entries: tuple[Tensor, ...],
    w_dec: Tensor,
    out: Tensor,
    shift: int,
    w_stride: int,
    several: bool,
    parts: int,
) -> None:
    """Launch the kernel; entries: begin and end of each position's, their rows of w_dec, values and columns of out."""
    targets = len(prefix_ptr) - 1
    grid = (len(entries[1]) * triton.cdiv(targets, c["BT"]), c["SHARES"])
    launch(
        edge_scores_kernel,
        grid,
        (
            gradient,
            prefix_ptr,
            *entries,
            w_dec,
            out,
            targets,
            gradient.shape[1],
            shift,
            gradient.stride(0),
            w_stride,
            out.stride(0),
        ),
        c,
        SEVERAL=several,
        PARTS=parts,
    )


def cross_layer_scores(
    features: CrossLayerFeatures, layer: int, gradient: Tensor, prefix_ptr: Tensor, out: Tensor, parts: int = 3
) -> None:
    """Add to out[t, column] the edges from the features of all layers up to `layer`, by their decoder rows for it.

    parts: as for edge_scores.
    """
    if not out.shape[0] or not len(gradient):
        return
    ends, w_dec = features.ends[layer], features.w_dec[0]
    chosen = HOPPER[shape_class(len(ends), len(prefix_ptr) - 1, w_dec)]
    entries = (features.row_ptr, ends, features.place, features.value, features.column)
    _launch(chosen, gradient, prefix_ptr, entries, w_dec, out, layer * features.step, UNIT, True, parts)


def _run_one_each(gradient: Tensor, prefix_ptr: Tensor, features: SparseFeatures, w_dec: Tensor, out: Tensor) -> Tensor:
    if out.numel() and len(gradient):
        grid = (len(prefix_ptr) - 1, triton.cdiv(features.positions, ONE_EACH["BP"]))
        launch(
            one_each_kernel,
            grid,
            (
                gradient,
                prefix_ptr,
                features.index,
                features.value,
                w_dec,
                out,
                gradient.shape[1],
                gradient.stride(0),
                w_dec.stride(0),
                out.stride(0),
            ),
            ONE_EACH,
        )
    return out


def _has_one_each(features: SparseFeatures) -> bool:
    """Tell if every position has one entry; remembered, as the check of offsets takes longer than a launch."""
    if features not in _one_each:
        _, count, most = checks.offsets("edge_scores", "features.row_ptr", features.row_ptr)
        _one_each[features] = count == features.positions and most == 1
    return _one_each[features]


def edge_scores(
    gradient: Tensor, prefix_ptr: Tensor, features: SparseFeatures, w_dec: Tensor, out: Tensor, parts: int = 3
) -> Tensor:
    """The op; parts: how many bfloat16 parts of each number are multiplied, 3 for float32's accuracy."""
    if _has_one_each(features):
        return _run_one_each(gradient, prefix_ptr, features, w_dec, out)
    chosen = HOPPER[shape_class(features.positions, len(prefix_ptr) - 1, w_dec)]
    return run(chosen, gradient, prefix_ptr, features, w_dec, out, parts)
