"""encode by screening, on AMX: rows rounded to bfloat16 find what may be active, and float32 decides."""

from __future__ import annotations

import pytest
import torch
from op_forms import ISAS
from torch import Tensor

import pycircuit as pc
from pycircuit.ops import BatchTopK, JumpReLU, ReLU, SparseFeatures, TopK, native
from pycircuit.ops.activations import Activation

pytestmark = pytest.mark.skipif("amx" not in ISAS, reason="needs AMX")
ROUNDING = 1e-6  # of the lengths of the two rows


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(features: SparseFeatures, size: int) -> tuple[Tensor, Tensor]:
    """Masks of active features and their values: [positions, size] both."""
    active = torch.zeros(features.positions, size, dtype=torch.bool)
    value = torch.zeros(features.positions, size)
    position = features.position()
    active[position, features.index], value[position, features.index] = True, features.value
    for begin, end in zip(features.row_ptr, features.row_ptr[1:], strict=False):
        assert (features.index[begin:end].diff() > 0).all()
    return active, value


def check(x: Tensor, w: Tensor, b: Tensor, activation: Activation, ignored: int = 0) -> None:
    """Every active feature is one by float64, every other is not, up to float32's rounding."""
    with pc.use("native", isa="amx"):
        active, value = dense(native.encode(x, w, b, activation, ignored), len(w))
    truth = x.double() @ w.double().T + b.double()
    slack = ROUNDING * (x.double().norm(dim=1)[:, None] * w.double().norm(dim=1) + b.double().abs()) + 1e-37
    assert not active[:ignored].any()
    active, value, truth, slack = (t[ignored:] for t in (active, value, truth, slack))
    assert ((value - truth).abs() <= slack)[active].all()
    if isinstance(activation, TopK):
        count = min(activation.k, len(w))
        assert (active.sum(1) <= count).all()
        ranked = truth if activation.keep_negative else truth.clip(min=0)
        least = ranked.sort(1, descending=True).values[:, count - 1 : count]
    else:
        least = torch.zeros(1) if isinstance(activation, ReLU) else torch.as_tensor(getattr(activation, "theta", 0.0))
        least = torch.tensor(activation.threshold) if isinstance(activation, BatchTopK) else least
    widest = slack.max(1, keepdim=True).values if isinstance(activation, TopK) else slack
    assert active[truth > least + 2 * widest].all()
    assert not active[truth < least - 2 * widest].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 31, 33, 200])
@pytest.mark.parametrize("width", [1, 31, 33, 100])
@pytest.mark.parametrize("positions", [16, 17, 75])
def test_shapes(positions: int, width: int, features: int, dtype: torch.dtype) -> None:
    x, w, b = normal(positions, width), normal(features, width, seed=1).to(dtype), 0.1 * normal(features, seed=2)
    high = JumpReLU(width**0.5 * (0.5 + torch.rand(features, generator=torch.Generator().manual_seed(3))))
    for activation in (ReLU(), high, BatchTopK(1.5 * width**0.5), TopK(3), TopK(40), TopK(7, keep_negative=True)):
        check(x, w, b, activation)
    check(x, w, b, high, ignored=11)
    check(x, w, b, TopK(5), ignored=positions)


def test_strided_rows() -> None:
    x, w = normal(40, 90)[:, 3:70], normal(70, 99, seed=1)[:, 5:72]
    for activation in (TopK(5), JumpReLU(torch.full((70,), 9.0))):
        check(x, w, normal(70, seed=2), activation)


@pytest.mark.parametrize("activation", [ReLU(), BatchTopK(0.5), TopK(4)])
@pytest.mark.parametrize("scale", [3e-38, 1e-30, 1e-22, 1e-15, 1e15, 1e17])
def test_magnitudes(scale: float, activation: Activation) -> None:
    """Squares that float32 has no room for, products that are denormal, rows of every length beside each other."""
    x, w = normal(64, 48), normal(96, 48, seed=1)
    x[::2] *= scale
    w[::3] *= scale
    check(x, w, 0.1 * normal(96, seed=2), activation)
    check(scale * x, w / scale, torch.zeros(96), activation)


def test_sums_that_cancel() -> None:
    """Terms 1e4 times their sum: rounding to bfloat16 loses all of it, the bound must know."""
    x, w = normal(64, 128), normal(256, 128, seed=1)
    x[:, 64:], w[:, 64:] = 1e4 * x[:, :64], w[:, :64]
    x[:, :64] = -1e4 * x[:, :64] + normal(64, 64, seed=3)
    for activation in (TopK(8), JumpReLU(torch.full((256,), 16.0))):
        check(x, w, torch.zeros(256), activation)


def test_equal_values_go_to_the_lower_feature() -> None:
    x, w = normal(50, 64), normal(300, 64, seed=1)
    w[100:200] = w[:100]
    w[200:] = w[50]
    x[7] = 0
    with pc.use("native", isa="amx"):
        active, _ = dense(native.encode(x, w, torch.zeros(300), TopK(20, keep_negative=True), 0), 300)
    truth = (x.double() @ w.double().T).float()
    for p in range(50):
        order = sorted(range(300), key=lambda f: (-truth[p, f], f))[:20]
        assert active[p].nonzero()[:, 0].tolist() == sorted(order)


def test_not_a_number_is_active_and_infinity_is_largest() -> None:
    x, w = normal(40, 64), normal(200, 64, seed=1)
    w[3, 5], w[150] = torch.nan, torch.inf
    x[11, 2], x[12] = torch.inf, torch.nan
    for activation in (TopK(6), JumpReLU(torch.full((200,), 5.0)), ReLU()):
        result = []
        for name in ("amx", "v4"):
            with pc.use("native", isa=name):
                result.append(dense(native.encode(x, w, torch.zeros(200), activation, 0), 200))
        assert torch.equal(result[0][0], result[1][0])
        assert torch.allclose(*(value for _, value in result), rtol=1e-5, atol=1e-5, equal_nan=True)
        assert result[0][0][:, 3].all() or activation == TopK(6)


def test_one_long_row_does_not_hide_the_others() -> None:
    """A feature of massive outputs is a thousand times longer than the others, and so is its bound."""
    x, w = normal(64, 64), normal(4096, 64, seed=1)
    w[17] *= 1e4
    for activation in (TopK(32), JumpReLU(torch.full((4096,), 20.0))):
        check(x, w, normal(4096, seed=2), activation)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    x, w, b = normal(200, 96), normal(3000, 96, seed=1), normal(3000, seed=2)
    before = torch.get_num_threads()
    try:
        for activation in (TopK(16), JumpReLU(torch.full((3000,), 25.0)), ReLU()):
            results = []
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                with pc.use("native", isa="amx"):
                    results.append(native.encode(x, w, b, activation, 0))
            for other in results[1:]:
                assert torch.equal(other.index, results[0].index) and torch.equal(other.value, results[0].value)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 64, 100])
def test_a_value_does_not_depend_on_its_neighbours(width: int, dtype: torch.dtype) -> None:
    """Bit for bit the same by a top-k, above a threshold, in a block where most are active, and at other positions."""
    x, w, b = normal(96, width), normal(300, width, seed=1).to(dtype), normal(300, seed=2)
    with pc.use("native", isa="amx"):
        every, values = dense(native.encode(x, w, b, BatchTopK(0.0), 0), 300)
        assert every.float().mean() > 0.4
        for activation, rows in (
            (TopK(9), slice(None)),
            (BatchTopK(2.0 * width**0.5), slice(None)),
            (ReLU(), slice(7, 40)),
        ):
            active, value = dense(native.encode(x[rows], w, b, activation, 0), 300)
            assert active.any() and torch.equal(value[active], values[rows][active])


def test_infinite_biases_and_more_that_are_not_numbers_than_k() -> None:
    x, w, b = normal(40, 64), normal(300, 64, seed=1), torch.zeros(300)
    b[::2], b[5] = -torch.inf, torch.inf
    w[20:40] = torch.nan
    with pc.use("native", isa="amx"):
        active, _ = dense(native.encode(x, w, b, TopK(8), 0), 300)
        assert active[:, 20:28].all() and active.sum() == 8 * 40
        active, _ = dense(native.encode(x, w[:20], b[:20], TopK(3), 0), 20)
    assert active[:, 5].all() and not active[:, ::2].any()


def test_products_that_overflow_only_when_they_are_rounded() -> None:
    """3.396e38 is a float32; of the rounded factors the product is infinite."""
    x, w, b = torch.full((16, 1), 1.8411e19), torch.tensor([[1.8446e19], [0.0]]), torch.tensor([0.0, 3.4e38])
    with pc.use("native", isa="amx"):
        assert native.encode(x, w, b, TopK(1), 0).index.tolist() == [1] * 16
