"""Precision of the sweep's dense products: names, tolerances of the law, and arithmetic.

A float32 number is the sum of three bfloat16 numbers, its parts, of eight bits each. A product of two numbers is the
sum of products of their parts, and the six largest of these are as good as float32. Tensor cores multiply bfloat16
and add in float32. One product of matrices adds up all six, the smallest first: the parts that meet stand side by
side in the rows and one above another in the weight.

    [a1 a2 a3  a1 a2  a1] [b3; b2; b1;  b2; b1;  b1]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from pycircuit.ops import Prepared
from pycircuit.ops.dispatch import machine, multiplies_bfloat16
from pycircuit.ops.products import product
from pycircuit.ops.torch_settings import tf32_products

Precision = Literal["float32", "float32-fast", "tf32", "bfloat16"]

_TF32_SPLIT = 2.0**13 + 1  # Veltkamp's constant: a float32 has 24 bits, a tf32 has 11


@dataclass(frozen=True)
class Arithmetic:
    """Arithmetic of a matrix product whose sums are float32, or float64 in a float64 model.

    tolerance: of the law, the largest certificate of a right graph. parts: numbers of type `dtype` that each factor is
    split into; 0: factors are of this type themselves. native: the CPU's own product splits them.
    """

    name: str
    tolerance: float
    dtype: torch.dtype
    parts: int
    native: bool = False

    @property
    def meetings(self) -> list[tuple[int, int]]:
        """Pairs of a part of a row and a part of a weight that are multiplied, the smallest products first."""
        return [(k, n - k) for n in reversed(range(self.parts)) for k in range(n + 1)]

    @property
    def kernel_parts(self) -> int:
        """Parts of each number that attend_back and edge_scores multiply on a GPU; there tf32 is two parts too."""
        return 2 if self.name == "tf32" else self.parts

    def weight_bytes(self, on_gpu: bool) -> int:
        """Return the bytes of a weight's number in split form."""
        return 0 if self.native else len(self.meetings) * (self.dtype.itemsize if on_gpu else 4)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's number while it is multiplied: its parts, and their copy where no kernel splits it."""
        return 0 if self.native else len(self.meetings) * (self.dtype.itemsize + 4)


PRECISIONS: dict[str, Arithmetic] = {
    "float32": Arithmetic("float32", 1e-5, torch.bfloat16, 3),
    "float32-fast": Arithmetic("float32-fast", 1e-5, torch.bfloat16, 2),
    "tf32": Arithmetic("tf32", 5e-4, torch.float32, 1),
    "bfloat16": Arithmetic("bfloat16", 5e-3, torch.bfloat16, 1),
}
FLOAT32 = replace(PRECISIONS["float32"], dtype=torch.float32, parts=0)
FLOAT64 = Arithmetic("float64", 1e-10, torch.float64, 0)


def arithmetic_of(op: str, precision: str, device: torch.device, dtype: torch.dtype) -> Arithmetic:
    """Return the arithmetic of a precision for a model of this device and type; errors name the function `op`."""
    if not isinstance(precision, str):
        raise TypeError(f"{op}: precision must be a string, got {type(precision).__name__}; leave it out for 'float32'")
    if precision not in PRECISIONS:
        known = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"{op}: precision must be one of {known}, got {precision!r}; 'float32' is the default")
    if dtype == torch.float64:
        if precision != "float32":
            raise ValueError(
                f"{op}: precision must be left out for a float64 model, which is traced in float64, got "
                f"{precision!r}; load the model with dtype='float32'"
            )
        return FLOAT64
    if device.type == "cuda":
        if TorchVersion(torch.__version__) < "2.10":
            raise RuntimeError(f"{op}: torch must be 2.10 or newer on a GPU, got {torch.__version__}; upgrade torch")
        return PRECISIONS[precision]
    if precision == "tf32":
        raise ValueError(
            f"{op}: precision must be 'float32', 'float32-fast' or 'bfloat16' on a CPU, which has no tf32, got "
            f"{precision!r}; leave it out, or load the model with device='cuda'"
        )
    chosen = PRECISIONS[precision]
    if precision != "float32" and multiplies_bfloat16():
        return replace(chosen, native=True)
    return chosen if precision == "bfloat16" else replace(FLOAT32, name=precision)


@dataclass(frozen=True, eq=False)
class Denominators:
    """Norm denominators of rows. sigma: [positions]; position: [rows], of each row."""

    sigma: Tensor
    position: Tensor

    def of_rows(self) -> Tensor:
        return self.sigma[self.position]


def has_fused_kernels(like: Tensor) -> bool:
    """Return True where kernels stand for several of torch's: for float32 on a GPU with Triton."""
    return like.is_cuda and like.dtype == torch.float32 and machine().triton is None


def with_parts(prepared: Prepared, arithmetic: Arithmetic) -> Prepared:
    """Return an op that multiplies as many parts of each number as the arithmetic, where a kernel can."""
    in_parts = prepared.ran.implementation == "triton"
    if arithmetic.native and prepared.ran.implementation == "native":
        in_parts = prepared.ran.op == "attend_back"
    if not in_parts or arithmetic.kernel_parts in (0, 3):
        return prepared
    return replace(prepared, form=partial(prepared.form, parts=arithmetic.kernel_parts))


class Products:
    """Products of rows and weights. A weight is split at its first product; its parts are stored."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic
        self._parts: dict[Tensor, Tensor] = {}  # of every weight: [meetings * inner, columns]

    def project(
        self, rows: Tensor, weight: Tensor, out: Tensor | None = None, divisor: Denominators | None = None
    ) -> Tensor:
        """Return rows / divisor @ weight: [n, columns].

        rows: [n, inner]; weight: [inner, columns], one tensor in every call; divisor: None for ones.
        """
        if not self.arithmetic.parts:
            return product(rows, weight, out, divisor=None if divisor is None else divisor.of_rows())
        if out is None:
            out = rows.new_empty(len(rows), weight.shape[1])
        if self.arithmetic.native:
            return self._native(rows, weight, out, False, divisor)
        _multiply(self.split(rows, divisor), self._weight(weight), out, False)
        return out

    def add(self, state: Tensor, rows: Tensor, weight: Tensor, divisor: Denominators | None = None) -> None:
        """Add rows / divisor @ weight to state; shapes as in `project`. A divisor may overwrite the rows."""
        if not self.arithmetic.parts:
            product(rows, weight, state, add=True, divisor=None if divisor is None else divisor.of_rows())
        elif self.arithmetic.native:
            self._native(rows, weight, state, True, divisor)
        else:
            _multiply(self.split(rows, divisor), self._weight(weight), state, True)

    def _native(
        self, rows: Tensor, weight: Tensor, out: Tensor, add: bool, divisor: Denominators | None = None
    ) -> Tensor:
        from pycircuit.ops import native

        denominators = None if divisor is None else divisor.of_rows()
        return native.product(rows, weight.float(), out, add, denominators, self.arithmetic.parts)

    def release(self) -> None:
        """Free the parts of all weights."""
        self._parts.clear()

    def split(self, rows: Tensor, divisor: Denominators | None = None) -> Tensor:
        """Return the parts of each row / divisor side by side, as they meet a weight's: [n, meetings * inner]."""
        if has_fused_kernels(rows) and self.arithmetic.dtype == torch.bfloat16:
            denominators = () if divisor is None else (divisor.sigma, divisor.position)
            parts: Tensor = import_module("pycircuit.kernels.split").split(rows, self.arithmetic.parts, *denominators)
            return parts
        terms = self._parts_of(rows if divisor is None else rows / divisor.of_rows()[:, None])
        return torch.cat([terms[k] for k, _ in self.arithmetic.meetings], 1)

    def _weight(self, weight: Tensor) -> Tensor:
        """Return the parts of a weight one above another, as they meet those of rows: [meetings * inner, columns]."""
        if weight not in self._parts:
            parts = self._parts_of(weight.float())
            self._parts[weight] = torch.cat([parts[n] for _, n in self.arithmetic.meetings])
        return self._parts[weight]

    def _parts_of(self, numbers: Tensor) -> list[Tensor]:
        """Split numbers into ever smaller terms; on a CPU in float32, where their products are exact.

        Where the type of a term is float32, there is one: the number rounded to tf32.
        """
        if self.arithmetic.dtype == torch.float32:
            high = numbers * _TF32_SPLIT
            return [high - (high - numbers)]
        parts = []
        for _ in range(self.arithmetic.parts):
            term = numbers.to(self.arithmetic.dtype)
            parts.append(term if term.is_cuda else term.float())
            numbers = numbers - term
        return parts


def _multiply(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """Compute out = (out + if add) left @ right from parts, with float32 sums."""
    if not out.is_cuda:
        product(left, right, out, add)
    elif left.dtype == torch.float32:
        with tf32_products():
            out.addmm_(left, right, beta=int(add))
    else:
        torch.addmm(out, left, right, beta=int(add), out_dtype=torch.float32, out=out)
