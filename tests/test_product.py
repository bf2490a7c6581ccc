"""The native matrix product: against float64 at awkward shapes, in every ISA, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from op_forms import ISAS
from torch import Tensor

import pycircuit as pc
from pycircuit.ops import native
from pycircuit.ops.dispatch import PARTS_ISAS

every_isa = pytest.mark.parametrize("isa", ISAS)
every_thread_count = pytest.mark.parametrize("threads", [1, 2])
POISON = float("nan")
# Around one and several vectors, tiles and blocks of the depth; 1,200 and 4,000 rows go the way of many rows.
ROWS, DEPTHS, COLUMNS = (1, 5, 7, 17, 64), (0, 1, 7, 64, 401), (1, 5, 17, 63, 130)
SHAPES = [*product(ROWS, DEPTHS, COLUMNS), (0, 5, 7), (5, 7, 0), (0, 0, 0), (2, 0, 3), (1201, 77, 35), (4001, 9, 18)]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def strided(rows: int, columns: int, g: torch.Generator, aligned: bool = False) -> Tensor:
    """A matrix whose rows lie apart, from an odd address on unless `aligned`."""
    if aligned:
        return torch.randn(rows, columns, generator=g)
    return torch.randn(rows, columns + 5, generator=g)[:, 3 : columns + 3]


def exact(a: Tensor, b: Tensor, divisor: Tensor | None) -> Tensor:
    a = a.double() if divisor is None else a.double() / divisor.double()[:, None]
    return a @ b.double()


# Share of the sum of absolute values that rounding explains, by parts: a few units in float32's last place, or what the
# parts leave out: 2^-8 of a number for each part.
ROUNDING = {0: 8e-7, 1: 2.01 * 2.0**-8, 2: 3.1 * 2.0**-16, 3: 8e-7}


def bound(a: Tensor, b: Tensor, divisor: Tensor | None, parts: int) -> Tensor:
    return exact(a.abs(), b.abs(), None if divisor is None else divisor.abs()) * ROUNDING[parts] + 1e-30


def check(
    shape: tuple[int, int, int], isa: str, transposed: bool, add: bool, divided: bool, aligned: bool, parts: int = 0
) -> None:
    g = generator()
    rows, depth, columns = shape
    a = strided(rows, depth, g, aligned)
    b = strided(columns, depth, g, aligned).t() if transposed else strided(depth, columns, g, aligned)
    divisor = torch.rand(rows, generator=g) + 0.5 if divided else None
    memory = torch.full((rows, columns + 5), POISON)
    out = memory[:, 2 : columns + 2]
    before = torch.randn(rows, columns, generator=g)
    if add:
        out.copy_(before)
    with pc.use("native", isa=isa):
        assert native.product(a, b, out, add, divisor, parts) is out
    error = (out - exact(a, b, divisor) - (before if add else 0)).abs()
    assert (error <= bound(a, b, divisor, parts) + 1e-6 * before.abs() * add).all(), (shape, transposed, add, divided)
    assert memory[:, :2].isnan().all() and memory[:, columns + 2 :].isnan().all()


@every_isa
@every_thread_count
@pytest.mark.parametrize("transposed", [False, True])
def test_product_against_float64(isa: str, threads: int, transposed: bool) -> None:
    torch.set_num_threads(threads)
    for number, shape in enumerate(SHAPES):
        check(shape, isa, transposed, bool(number % 2), bool(number % 3), bool(number % 5))
        check(shape, isa, transposed, not number % 2, not number % 3, not number % 5)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in PARTS_ISAS] or ["none here"])
@every_thread_count
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_product_of_parts_against_float64(isa: str, threads: int, parts: int) -> None:
    """One, two and three bfloat16 parts of each number, and float32's accuracy with three."""
    if isa not in ISAS:
        pytest.skip("needs AVX512_BF16")
    torch.set_num_threads(threads)
    for number, shape in enumerate(SHAPES):
        check(shape, isa, bool(number % 2), bool(number % 3), bool(number % 5), bool(number % 7), parts)
        check(shape, isa, not number % 2, not number % 3, not number % 5, not number % 7, parts)


@every_isa
@every_thread_count
@pytest.mark.parametrize("shape", [(1201, 401, 130), (300, 801, 140), (64, 576, 700)])
def test_product_of_several_blocks(isa: str, threads: int, shape: tuple[int, int, int]) -> None:
    """Shapes that several threads share, and that are added to several times."""
    torch.set_num_threads(threads)
    for transposed, add in product((False, True), repeat=2):
        check(shape, isa, transposed, add, True, False)


@every_isa
@every_thread_count
def test_an_element_does_not_depend_on_other_rows_and_columns(isa: str, threads: int) -> None:
    """To the bit: in any batch, with b transposed or not, and on any number of threads."""
    torch.set_num_threads(threads)
    g = generator()
    a, b = strided(1500, 401, g), strided(401, 95, g)
    with pc.use("native", isa=isa):
        expected = native.product(a, b, torch.empty(1500, 95))
        for first, end in ((0, 1), (3, 11), (5, 69), (100, 701), (400, 1500)):
            for left, right in ((0, 95), (7, 24), (31, 95)):
                transposed = b[:, left:right].t().contiguous().t()
                for view in (b[:, left:right], transposed):
                    out = native.product(a[first:end], view, torch.empty(end - first, right - left))
                    assert torch.equal(out, expected[first:end, left:right]), (first, left)
        torch.set_num_threads(1)
        assert torch.equal(native.product(a, b, torch.empty(1500, 95)), expected)


@every_isa
@pytest.mark.parametrize("rows", [3, 64, 1300])
def test_product_spreads_nan_and_infinity_like_torch(isa: str, rows: int) -> None:
    g = generator()
    a, b = torch.randn(rows, 70, generator=g), torch.randn(70, 37, generator=g)
    a[1, 5], a[2, 69], b[:, 3], b[9, 36] = POISON, float("inf"), 0.0, float("-inf")
    a[0, 9] = 0.0
    with pc.use("native", isa=isa):
        out = native.product(a, b, torch.full((rows, 37), POISON))
    expected = a @ b
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    assert out[2, 3].isnan() and out[0, 36].isnan() and torch.equal(out.sign().isnan(), expected.sign().isnan())


@every_isa
def test_division_is_that_of_torch(isa: str) -> None:
    """To the bit: the product with the identity shows the divided rows."""
    g = generator()
    a, divisor = torch.randn(19, 33, generator=g), torch.rand(19, generator=g) * 3
    divisor[3], divisor[5] = 0.0, float("inf")
    with pc.use("native", isa=isa):
        out = native.product(a, torch.eye(33), torch.empty(19, 33), divisor=divisor)
    finite = divisor != 0
    assert torch.equal(out[finite], (a / divisor[:, None])[finite])
    assert out[3].isnan().all()  # infinity times zero


def refused(**changes: Any) -> dict[str, Any]:
    return {"a": torch.ones(4, 6), "b": torch.ones(6, 5), "out": torch.ones(4, 5), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": torch.ones(4, 7)}, ValueError, r"a and b must be .*, got \(4, 7\) and \(6, 5\)"),
        ({"a": torch.ones(4)}, ValueError, r"a and b must be .*, got \(4,\) and \(6, 5\)"),
        ({"out": torch.ones(5, 5)}, ValueError, r"out must be \(4, 5\), .*, got"),
        ({"a": torch.ones(6, 4).t()}, ValueError, r"a must be contiguous along a row, got strides \(1, 4\); call"),
        (
            {"b": torch.ones(6, 10)[:, ::2]},
            ValueError,
            r"b must be contiguous along a row or a column, got",
        ),
        ({"out": torch.ones(5, 4).t()}, ValueError, r"out must have rows apart from each other, got strides \(1, 4\)"),
        ({"out": torch.ones(5).expand(4, 5)}, ValueError, r"out must have rows apart from each other"),
        ({"out": torch.ones(4, 10)[:, ::2]}, ValueError, r"out must be contiguous along a row, got strides \(10, 2\)"),
        ({"a": torch.ones(4, 6, dtype=torch.bfloat16)}, TypeError, r"a must be float32 on the CPU, got torch.bfloat16"),
        ({"b": torch.ones(6, 5, dtype=torch.float64)}, TypeError, r"b must be float32 on the CPU, got torch.float64"),
        ({"a": torch.ones(4, 6, device="meta")}, TypeError, r"a must be float32 on the CPU, got torch.float32 on meta"),
        ({"divisor": torch.ones(5)}, ValueError, r"divisor must be \(4,\), one for each row, got \(5,\)"),
        ({"divisor": torch.ones(8)[::2]}, ValueError, r"divisor must be contiguous"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"product: {message}"):
        native.product(**refused(**changes))
