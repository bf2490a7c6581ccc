"""split: rows, over a norm's denominators, as bfloat16 parts in the order in which a weight's parts multiply them.

Part k of a row is the row minus its parts before k, rounded: a1, a2, a3. Three parts are written a1 a2 a3 a1 a2 a1.
Layout: numbers [rows, width] by row stride, parts [rows, count (count + 1) / 2, width] contiguous.
Bytes: numbers once, parts once. Parallel: row x block of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycircuit.kernels.config import config
from pycircuit.kernels.launch import launch
from torch import Tensor

BLOCK = config(4, 1, BLOCK=1024)


@triton.jit(do_not_specialize_on_alignment=("sigma", "position"))  # of slices that begin anywhere
def split_kernel(
    numbers,
    sigma,
    position,
    parts,
    width,
    stride,
    DIVIDED: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    remainder = tl.load(numbers + row * stride + column, mask=inside, other=0.0)
    if DIVIDED:
        remainder /= tl.load(sigma + tl.load(position + row))
    cell = parts + row * (COUNT * (COUNT + 1) // 2) * width + column
    for k in tl.static_range(COUNT):
        rounded = remainder.to(tl.bfloat16)
        for n in tl.static_range(COUNT - k):  # group n has the first COUNT - n parts
            tl.store(cell + (n * COUNT - n * (n - 1) // 2 + k) * width, rounded, mask=inside)
        remainder -= rounded.to(tl.float32)


def split(numbers: Tensor, count: int, sigma: Tensor | None = None, position: Tensor | None = None) -> Tensor:
    """Parts of each row, over sigma[position] where given, side by side: [rows, count * (count + 1) / 2 * width]."""
    rows, width = numbers.shape
    parts = numbers.new_empty(rows, count * (count + 1) // 2 * width, dtype=torch.bfloat16)
    if parts.numel():
        divided = sigma is not None and position is not None
        denominators = (sigma, position) if divided else (numbers, numbers)
        grid = (rows, triton.cdiv(width, BLOCK["BLOCK"]))
        launch(
            split_kernel,
            grid,
            (numbers, *denominators, parts, width, numbers.stride(0)),
            BLOCK,
            DIVIDED=divided,
            COUNT=count,
        )
    return parts
