"""norm_back: out[r] = gain[layer[r]] * gradient[r] / sigma[cell[r]], the transpose of norms that subtract no mean.

Layout: gradient [rows, width] by row stride, out [rows, width] contiguous. Bytes: gradient once, out once.
Parallel: row x block of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycircuit.kernels.config import config
from pycircuit.kernels.launch import launch
from torch import Tensor

BLOCK = config(4, 1, BLOCK=1024)


@triton.jit(do_not_specialize_on_alignment=("sigma", "cell", "layer"))  # of slices that begin anywhere
def norm_back_kernel(
    gradient,
    gain,
    sigma,
    cell,
    layer,
    out,
    width,
    stride,
    HAS_GAIN: tl.constexpr,
    HAS_LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    numbers = tl.load(gradient + row * stride + column, mask=inside, other=0.0)
    if HAS_LAYER:
        gain += tl.load(layer + row) * width
    if HAS_GAIN:
        numbers *= tl.load(gain + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, numbers / tl.load(sigma + tl.load(cell + row)), mask=inside)


def norm_back(
    gradient: Tensor, gain: Tensor | None, sigma: Tensor, cell: Tensor, layer: Tensor | None = None
) -> Tensor:
    """Gradients before a norm from those after it: [rows, width].

    gain: [width], or [layers, width] with the layer of each row; cell: [rows], where in sigma each row's is.
    """
    out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    if out.numel():
        rows, width = gradient.shape
        launch(
            norm_back_kernel,
            (rows, triton.cdiv(width, BLOCK["BLOCK"])),
            (
                gradient,
                sigma if gain is None else gain,
                sigma,
                cell,
                cell if layer is None else layer,
                out,
                width,
                gradient.stride(0),
            ),
            BLOCK,
            HAS_GAIN=gain is not None,
            HAS_LAYER=layer is not None,
        )
    return out
