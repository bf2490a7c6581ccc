"""decode: out[s, p] = bias[s] + sum over the active entries e of p: value[e] * w_dec[index[e], s].

Layout: w_dec [features, slots, width] by row strides; features in CSR by position; out [slots, positions, width].
Bytes: active x slots x width elements of w_dec, read once (again from L2 where positions share a feature), and out.
Parallel: position x block of the width x slot; entries are summed in CSR order, BE of them in flight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycircuit.kernels.config import Config, config, prune
from pycircuit.kernels.launch import launch
from torch import Tensor

from pycircuit.ops.features import SparseFeatures


def needs(c: Config) -> tuple[int, int]:
    return 4 * c["BE"] * c["BD"], c["BE"] * c["BD"]


MAX_ACCUMULATORS = 64  # per thread
SPACE = prune(
    (config(w, 2, BE=e, BD=d) for d in (128, 256, 512, 1024) for e in (4, 8, 16) for w in (2, 4, 8)),
    needs,
    MAX_ACCUMULATORS,
)

# An H200 takes 0.028 ms at gemma2b, twice as long as a copy. Chosen: a width block that divides 2,304 and 4,096, 16
# bytes per thread and at least 16 KiB in flight per program; in bfloat16, half the bytes per element, twice the width.
HOPPER = {"float32": config(4, 2, BE=16, BD=256), "bfloat16": config(4, 2, BE=8, BD=512)}


@triton.jit(do_not_specialize=("positions",))  # changes from call to call and aligns nothing
def decode_kernel(
    row_ptr,
    index,
    value,
    w_dec,
    bias,
    out,
    positions,
    width,
    w_stride,
    slot_stride,
    HAS_BIAS: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    p, s = tl.program_id(0), tl.program_id(2)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = d < width
    begin, end = tl.load(row_ptr + p), tl.load(row_ptr + p + 1)
    w_dec += s.to(tl.int64) * slot_stride
    acc = tl.zeros((BE, BD), tl.float32)
    for e0 in range(begin, end, BE):
        e = e0 + tl.arange(0, BE)
        feature = tl.load(index + e, mask=e < end, other=0)
        scale = tl.load(value + e, mask=e < end, other=0.0)
        row = w_dec + feature[:, None] * w_stride + d[None, :]
        acc += scale[:, None] * tl.load(row, mask=(e < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    total = tl.sum(acc, axis=0)
    if HAS_BIAS:
        total += tl.load(bias + s.to(tl.int64) * width + d, mask=inside, other=0.0)
    tl.store(out + (s.to(tl.int64) * positions + p) * width + d, total, mask=inside)


def shape_class(w_dec: Tensor) -> str:
    return "bfloat16" if w_dec.dtype == torch.bfloat16 else "float32"


def run(c: Config, features: SparseFeatures, w_dec: Tensor, bias: Tensor | None) -> Tensor:
    slots, slot_stride = (w_dec.shape[1], w_dec.stride(1)) if w_dec.ndim == 3 else (1, 0)
    width = w_dec.shape[-1]
    out = features.value.new_empty(*w_dec.shape[1:-1], features.positions, width)
    if not out.numel():
        return out
    grid = (features.positions, triton.cdiv(width, c["BD"]), slots)
    launch(
        decode_kernel,
        grid,
        (
            features.row_ptr,
            features.index,
            features.value,
            w_dec,
            features.value if bias is None else bias.float().contiguous(),
            out,
            features.positions,
            width,
            w_dec.stride(0),
            slot_stride,
        ),
        c,
        HAS_BIAS=bias is not None,
    )
    return out


def decode(features: SparseFeatures, w_dec: Tensor, bias: Tensor | None) -> Tensor:
    return run(HOPPER[shape_class(w_dec)], features, w_dec, bias)
