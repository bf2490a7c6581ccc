"""Training steps by native kernels against those by autograd and torch's Adam."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import WIDTH, build
from training_cases import RECIPE, corpus

import pycircuit as pc
from pycircuit.model.agreement import relative_error
from pycircuit.ops import SparseFeatures
from pycircuit.training import Recipe, Trainer
from pycircuit.training.fused_step import FusedStep
from pycircuit.training.learner import Learner

pytestmark = pytest.mark.usefixtures("one_thread")

MOMENTS = ("exp_avg", "exp_avg_sq")
ISAS = [name for name, supported in pc.ops.dispatch.native_isas() if supported]


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize(("rows", "skip"), [("random", False), ("tokens", False), ("tokens", True)])
def test_a_run_is_that_of_autograd(activation: str, rows: str, skip: bool) -> None:
    """Weights, both of Adam's moments and measurements after 60 steps, revived features among them."""
    recipe = replace(RECIPE, activation=activation, rows=rows, skip=skip)
    fused, taped = (Trainer(build("llama"), corpus(), recipe) for _ in range(2))
    assert fused.fused
    taped.fused = None
    for trainer in (fused, taped):
        with torch.no_grad():
            for b_enc in trainer.learner.b_enc:
                b_enc[:10] = -50  # dead until they are revived
        trainer.run(progress=False)
    torch.testing.assert_close(fused.measurements, taped.measurements, rtol=1e-4, atol=1e-5)
    assert torch.equal(fused.last_active, taped.last_active)
    for ours, theirs in zip(fused.parameters.values(), taped.parameters.values(), strict=True):
        assert relative_error(ours.detach(), theirs.detach()) < 1e-3
        for moment in MOMENTS:
            assert relative_error(fused.adam.state[ours][moment], taped.adam.state[theirs][moment]) < 1e-3


def test_other_runs_go_through_autograd() -> None:
    for other in ({"kind": "clt"}, {"activation": "jumprelu"}, {"precision": "bfloat16"}):
        assert Trainer(build("llama"), corpus(), replace(RECIPE, **other)).fused is None
    assert Trainer(build("llama", torch.float64), corpus(), RECIPE).fused is None
    with pc.use("reference"):
        assert Trainer(build("llama"), corpus(), RECIPE).fused is None


def dense_gradients(learner: Learner, x: torch.Tensor, y: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """Loss of a layer, and gradients of w_enc, b_enc, w_dec and b_dec, in float64 through a dense top-k."""
    weights = [learner.w_enc[0], learner.b_enc[0], learner.w_dec[0][0], learner.b_dec]
    w_enc, b_enc, w_dec, b_dec = leaves = [t.detach().double().requires_grad_() for t in weights]
    best = (x.double() @ w_enc.T + b_enc).relu().topk(learner.recipe.k)
    active = torch.zeros(len(x), len(w_enc), dtype=torch.float64).scatter(1, best.indices, best.values)
    loss = (active @ w_dec + b_dec - y.double()).square().sum() / y.numel()
    loss.backward()
    return float(loss.detach()), [t.grad for t in leaves]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("positions", [1, 7, 300])
def test_moments_of_a_step_are_dense_gradients(isa: str, positions: int) -> None:
    """Adam's first moments after a step are 0.1 times the gradients, its second ones 0.001 times their squares."""
    width, size = WIDTH + 3, 200  # no multiple of a vector
    recipe = Recipe(features=size, k=5, batch=positions)
    learner = Learner(recipe, 1, width, torch.float32, torch.device("cpu"))
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, positions, width, generator=g)
    loss, gradients = dense_gradients(learner, x, y)
    parameters = [learner.w_enc[0], learner.b_enc[0], learner.w_dec[0], learner.b_dec]
    adam = torch.optim.Adam(learner.tensors().values(), lr=1e-3)
    with pc.use("native", isa):
        fused = FusedStep(learner, adam)
        fused.start(0, 1e-3)
        done = fused.layer(0, x, y, 2 / y.numel())
        fused.biases(done.gradient.sum(0)[None])
    assert abs(float(done.squares[0]) / y.numel() - loss) < 1e-5 * loss
    assert abs(float(done.squares[1]) - float(y.double().square().sum())) < 1e-5 * float(y.square().sum())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        mean, square = (adam.state[parameter][moment].double().view_as(gradient) for moment in MOMENTS)
        assert relative_error(mean, 0.1 * gradient) < 1e-5
        assert relative_error(square, 0.001 * gradient.square()) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 7, 64, 99])
def test_adam_is_that_of_torch(isa: str, width: int) -> None:
    """Ten steps, a third of the rows without a gradient: torch moves these too, while their moments last."""
    g = torch.Generator().manual_seed(4)
    learner = Learner(Recipe(features=30, k=1), 1, width, torch.float32, torch.device("cpu"))
    ours = learner.w_enc[0]
    theirs = ours.detach().double().clone().requires_grad_()
    adams = torch.optim.Adam([ours], lr=1e-2), torch.optim.Adam([theirs], lr=1e-2)
    fused = FusedStep(learner, adams[0])
    with pc.use("native", isa):
        for step in range(10):
            lengths = torch.randint(0, 3, (30,), generator=g) * 3
            row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            count = int(row_ptr[-1])
            source = torch.randn(12, width, generator=g)
            index, value = torch.randint(0, 12, (count,), generator=g), torch.randn(count, generator=g)
            gradient = SparseFeatures(row_ptr, index, value)
            theirs.grad = torch.stack([row @ source.double() for row in gradient_rows(gradient, 12)])
            fused.start(step, 1e-2)
            fused._update(ours, gradient, source)
            adams[1].step()
    assert relative_error(ours.detach(), theirs.detach()) < 1e-6
    for moment in MOMENTS:
        assert relative_error(adams[0].state[ours][moment], adams[1].state[theirs][moment]) < 1e-5


def gradient_rows(gradient: SparseFeatures, sources: int) -> torch.Tensor:
    """Coefficients of every source row: [rows, sources] float64; a source may occur twice in a row."""
    rows = torch.zeros(gradient.positions, sources, dtype=torch.float64)
    return rows.index_put_((gradient.position(), gradient.index), gradient.value.double(), accumulate=True)
