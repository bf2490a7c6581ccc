"""encode by screening: rows rounded to bfloat16 find what may be active, and float32 decides. AMX or AVX512_BF16."""

from __future__ import annotations

import pytest
import torch
from op_forms import ISAS
from torch import Tensor

import pycircuit as pc
from pycircuit.ops import BatchTopK, JumpReLU, ReLU, SparseFeatures, TopK, native
from pycircuit.ops.activations import Activation
from pycircuit.ops.dispatch import PARTS_ISAS

USABLE = [isa for isa in ISAS if isa in PARTS_ISAS]
every_isa = pytest.mark.parametrize("isa", USABLE or ["none here"])
ROUNDING = 1e-6  # of the lengths of the two rows


@pytest.fixture(autouse=True)
def instructions(request: pytest.FixtureRequest) -> None:
    if not USABLE and "isa" in request.fixturenames:
        pytest.skip("needs AVX512_BF16")


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


def check(isa: str, x: Tensor, w: Tensor, b: Tensor, activation: Activation, ignored: int = 0) -> None:
    """Every active feature is one by float64, every other is not, up to float32's rounding."""
    with pc.use("native", isa=isa):
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


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 31, 33, 200])
@pytest.mark.parametrize("width", [1, 31, 33, 100])
@pytest.mark.parametrize("positions", [16, 17, 75])
def test_shapes(isa: str, positions: int, width: int, features: int, dtype: torch.dtype) -> None:
    x, w, b = normal(positions, width), normal(features, width, seed=1).to(dtype), 0.1 * normal(features, seed=2)
    high = JumpReLU(width**0.5 * (0.5 + torch.rand(features, generator=torch.Generator().manual_seed(3))))
    for activation in (ReLU(), high, BatchTopK(1.5 * width**0.5), TopK(3), TopK(40), TopK(7, keep_negative=True)):
        check(isa, x, w, b, activation)
    check(isa, x, w, b, high, ignored=11)
    check(isa, x, w, b, TopK(5), ignored=positions)


@every_isa
def test_strided_rows(isa: str) -> None:
    x, w = normal(40, 90)[:, 3:70], normal(70, 99, seed=1)[:, 5:72]
    for activation in (TopK(5), JumpReLU(torch.full((70,), 9.0))):
        check(isa, x, w, normal(70, seed=2), activation)


@every_isa
@pytest.mark.parametrize("activation", [ReLU(), BatchTopK(0.5), TopK(4)])
@pytest.mark.parametrize("scale", [3e-38, 1e-30, 1e-22, 1e-15, 1e15, 1e17])
def test_magnitudes(isa: str, scale: float, activation: Activation) -> None:
    """Squares that float32 has no room for, products that are denormal, rows of every length beside each other."""
    x, w = normal(64, 48), normal(96, 48, seed=1)
    x[::2] *= scale
    w[::3] *= scale
    check(isa, x, w, 0.1 * normal(96, seed=2), activation)
    check(isa, scale * x, w / scale, torch.zeros(96), activation)


@every_isa
def test_sums_that_cancel(isa: str) -> None:
    """Terms 1e4 times their sum: rounding to bfloat16 loses all of it, the bound must know."""
    x, w = normal(64, 128), normal(256, 128, seed=1)
    x[:, 64:], w[:, 64:] = 1e4 * x[:, :64], w[:, :64]
    x[:, :64] = -1e4 * x[:, :64] + normal(64, 64, seed=3)
    for activation in (TopK(8), JumpReLU(torch.full((256,), 16.0))):
        check(isa, x, w, torch.zeros(256), activation)


@every_isa
def test_equal_values_go_to_the_lower_feature(isa: str) -> None:
    x, w = normal(50, 64), normal(300, 64, seed=1)
    w[100:200] = w[:100]
    w[200:] = w[50]
    x[7] = 0
    with pc.use("native", isa=isa):
        active, _ = dense(native.encode(x, w, torch.zeros(300), TopK(20, keep_negative=True), 0), 300)
    truth = (x.double() @ w.double().T).float()
    for p in range(50):
        order = sorted(range(300), key=lambda f: (-truth[p, f], f))[:20]
        assert active[p].nonzero()[:, 0].tolist() == sorted(order)


@every_isa
def test_not_a_number_is_active_and_infinity_is_largest(isa: str) -> None:
    x, w = normal(40, 64), normal(200, 64, seed=1)
    w[3, 5], w[150] = torch.nan, torch.inf
    x[11, 2], x[12] = torch.inf, torch.nan
    for activation in (TopK(6), JumpReLU(torch.full((200,), 5.0)), ReLU()):
        result = []
        for name in (isa, "v4"):
            with pc.use("native", isa=name):
                result.append(dense(native.encode(x, w, torch.zeros(200), activation, 0), 200))
        assert torch.equal(result[0][0], result[1][0])
        assert torch.allclose(*(value for _, value in result), rtol=1e-5, atol=1e-5, equal_nan=True)
        assert result[0][0][:, 3].all() or activation == TopK(6)


@every_isa
def test_one_long_row_does_not_hide_the_others(isa: str) -> None:
    """A feature of massive outputs is a thousand times longer than the others, and so is its bound."""
    x, w = normal(64, 64), normal(4096, 64, seed=1)
    w[17] *= 1e4
    for activation in (TopK(32), JumpReLU(torch.full((4096,), 20.0))):
        check(isa, x, w, normal(4096, seed=2), activation)


@every_isa
def test_the_result_does_not_depend_on_the_number_of_threads(isa: str) -> None:
    x, w, b = normal(200, 96), normal(3000, 96, seed=1), normal(3000, seed=2)
    before = torch.get_num_threads()
    try:
        for activation in (TopK(16), JumpReLU(torch.full((3000,), 25.0)), ReLU()):
            results = []
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                with pc.use("native", isa=isa):
                    results.append(native.encode(x, w, b, activation, 0))
            for other in results[1:]:
                assert torch.equal(other.index, results[0].index) and torch.equal(other.value, results[0].value)
    finally:
        torch.set_num_threads(before)
