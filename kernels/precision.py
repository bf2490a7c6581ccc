"""Matrix products with float32 accuracy, on the units that the element types allow."""

from __future__ import annotations

import triton
import triton.language as tl

# NumPy has no bfloat16: the interpreter stores its bits as integers, so its products need float32 copies.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _upper(x):
    """Leading 8 significant bits of x, by truncation: never overflows, and x - _upper(x) is exact."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _dot_bfloat16(x, w, acc):
    if INTERPRETED:  # noqa: SIM108 - a choice at compile time, not a select
        acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, w, acc)
    return acc


@triton.jit
def _parts(x):
    """Three bfloat16 numbers, 8 + 8 + 8 bits, whose sum is x exactly; of an inf, the sum is NaN."""
    high = _upper(x)
    middle = _upper(x - high)
    low = x - high - middle
    if not INTERPRETED:
        high, middle, low = high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16)
    return high, middle, low


@triton.jit
def dot_six(x, w):
    """x @ w, both float32, as the six products of their parts that exceed 2^-24 of the result, smallest first."""
    x_high, x_middle, x_low = _parts(x)
    w_high, w_middle, w_low = _parts(w)
    total = tl.dot(x_low, w_high, input_precision="ieee")
    total = tl.dot(x_middle, w_middle, total, input_precision="ieee")
    total = tl.dot(x_high, w_low, total, input_precision="ieee")
    total = tl.dot(x_middle, w_high, total, input_precision="ieee")
    total = tl.dot(x_high, w_middle, total, input_precision="ieee")
    return tl.dot(x_high, w_high, total, input_precision="ieee")


@triton.jit
def _rounded(x):
    """The bfloat16 number nearest to x, as float32; of two as near, the even one."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _two_parts(x):
    """Two bfloat16 numbers, each the nearest to what is left, whose sum is x within 2^-18 of it."""
    if INTERPRETED:
        high = _rounded(x)
        middle = _rounded(x - high)
    else:
        high = x.to(tl.bfloat16)
        middle = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high, middle


@triton.jit
def dot_three(x, w):
    """x @ w, both float32, as the three products of their parts that exceed 2^-18 of the result, smallest first."""
    x_high, x_middle = _two_parts(x)
    w_high, w_middle = _two_parts(w)
    total = tl.dot(x_middle, w_high, input_precision="ieee")
    total = tl.dot(x_high, w_middle, total, input_precision="ieee")
    return tl.dot(x_high, w_high, total, input_precision="ieee")


@triton.jit
def dot(x, w, acc, PARTS: tl.constexpr = 3):
    """acc + x @ w. x: [m, k], w: [k, n], acc: [m, n] float32. PARTS: of a float32 number; 3 are all of it.

    Tensor cores truncate every sum: a tile's starts from zero and is rounded when it is added to acc, so that errors do
    not grow with the number of tiles. Both float32: six products of bfloat16 parts, which are as accurate. Weights in
    bfloat16: x is split into three bfloat16 parts, 8 + 8 + 8 bits, whose sum is x exactly, and every product is exact.
    Smallest part first. An inf in w times a part that is zero gives NaN, not inf.
    """
    zero = tl.zeros_like(acc)
    if w.dtype == tl.bfloat16 and x.dtype == tl.bfloat16:
        acc += _dot_bfloat16(x, w, zero)
    elif w.dtype == tl.bfloat16 and PARTS == 1:
        acc += _dot_bfloat16(x.to(tl.bfloat16), w, zero)
    elif w.dtype == tl.bfloat16 and PARTS == 2:
        high, middle = _two_parts(x)
        total = _dot_bfloat16(middle.to(tl.bfloat16), w, zero)
        acc += _dot_bfloat16(high.to(tl.bfloat16), w, total)
    elif w.dtype == tl.bfloat16:
        high = _upper(x)
        remainder = tl.where(x == high, 0.0, x - high)  # inf - inf
        middle = _upper(remainder)
        total = _dot_bfloat16((remainder - middle).to(tl.bfloat16), w, zero)
        total = _dot_bfloat16(middle.to(tl.bfloat16), w, total)
        acc += _dot_bfloat16(high.to(tl.bfloat16), w, total)
    elif INTERPRETED:  # six products take the interpreter three times as long; they have their own test
        acc = tl.dot(x.to(tl.float32), w, acc, input_precision="ieee")
    elif PARTS == 1:
        acc += tl.dot(x.to(tl.bfloat16), w.to(tl.bfloat16), zero)
    elif PARTS == 2:
        acc += dot_three(x.to(tl.float32), w)
    else:
        acc += dot_six(x.to(tl.float32), w)
    return acc
