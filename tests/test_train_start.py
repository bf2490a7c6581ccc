"""Beginning of a training run: linear paths, features of massive outputs, and passes over a buffer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import LAYERS, WIDTH, build
from torch import Tensor
from training_cases import RECIPE, corpus

from pycircuit.training import Recipe, Trainer
from pycircuit.training.learner import Learner
from pycircuit.training.massive import massive_feature, replace_massive
from pycircuit.training.recipe import ActivationName
from pycircuit.training.stream import Source

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and outputs [tokens, width] of which every tenth is massive, along one direction; a mask of those."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, WIDTH, generator=g), torch.randn(count, WIDTH, generator=g)
    mask = torch.arange(count) % 10 == 0
    x[mask] += 4 * torch.linspace(-1, 1, WIDTH)
    length = 300 + 100 * torch.rand(int(mask.sum()), 1, generator=g)
    y[mask] += length * torch.ones(WIDTH)
    return x, y, mask


def test_massive_outputs_get_a_feature_in_closed_form() -> None:
    """Fitted to opening positions, it explains massive outputs of later ones and is silent at all others."""
    x, y, mask = inputs(400, 0)
    feature = massive_feature((x[mask], y[mask]), (x[~mask], y[~mask]), 50.0)
    assert feature is not None
    x, y, mask = inputs(400, 1)
    value = (x @ feature.w_enc + feature.b_enc).clamp_min(0)
    assert not value[~mask].any() and value[mask].min() > 0
    error = y - value[:, None] * feature.w_dec
    assert error[mask].square().sum() < 0.1 * y[mask].square().sum()
    assert (y[mask].norm(dim=1) > feature.norm).all() and not (y[~mask].norm(dim=1) > feature.norm).any()
    assert massive_feature((x[mask], y[mask]), (x[~mask], y[~mask]), 1e6) is None  # none is so much longer
    assert massive_feature((x[mask][:7], y[mask][:7]), (x[~mask], y[~mask]), 50.0) is None  # too few
    alike = x[~mask][:40]  # inputs that tell nothing
    assert massive_feature((alike, y[mask]), (x[~mask], y[~mask]), 50.0) is None


def test_massive_tokens_leave_the_buffer() -> None:
    x, y, mask = inputs(60, 2)
    xs, ys = torch.stack([x, x]), torch.stack([y, y])
    replace_massive(xs, ys, [100.0, torch.inf])
    assert torch.equal(xs[1], x) and torch.equal(ys[1], y)
    assert torch.equal(xs[0][~mask], x[~mask]) and ys[0].norm(dim=1).max() < 100
    rows = [int((x == row).all(1).nonzero()[0, 0]) for row in xs[0][mask]]
    assert torch.equal(ys[0][mask], y[rows])


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_a_run_with_massive_outputs(activation: ActivationName, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's first feature explains them after training, and the others learn as if there were none."""
    activations = Source.activations

    def with_massive(source: Source, *arguments: object) -> tuple[Tensor, Tensor]:
        x, y = activations(source, *arguments)  # type: ignore[arg-type]
        mask = torch.arange(x.shape[1]) % (1 if source.ignore == 0 else 97) == 0  # all opening positions, few others
        x[1, mask] += 8 * torch.linspace(-1, 1, WIDTH) * x[1].std()
        y[1, mask] += 400 * y[1].std() * torch.ones(WIDTH)
        return x, y

    monkeypatch.setattr(Source, "activations", with_massive)
    recipe = replace(RECIPE, activation=activation, steps=40)
    explained = {}
    for ratio in (20.0, 0.0):
        trainer = Trainer(build("llama"), corpus(), replace(recipe, massive=ratio))
        transcoders = trainer.run(progress=False)
        assert list(trainer.massive) == ([1] if ratio else [])
        x, y = with_massive(trainer.source, trainer.stream.sequences)
        error = y - transcoders.reconstruct([transcoders.encode(i, rows) for i, rows in enumerate(x)], x)
        explained[ratio] = 1 - error[1].square().sum() / (y[1] - y[1].mean(0)).square().sum()
        mask = torch.arange(x.shape[1]) % 97 == 0
        ordinary = 1 - error[1, ~mask].square().sum() / y[1, ~mask].square().sum()
        if ratio:
            assert ordinary > 0.2 and trainer.history.dead[-1, 1] < 1
            assert not transcoders.encode(1, x[1, ~mask]).index.eq(0).any()
    assert explained[20.0] > 0.97 and 1 - explained[20.0] < (1 - explained[0.0]) / 3, explained


def test_linear_paths_begin_as_regressions() -> None:
    recipe = Recipe(features=8, k=1, skip=True)
    learner = Learner(recipe, LAYERS, WIDTH, torch.float32, torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    x, true = torch.randn(LAYERS, 3000, WIDTH, generator=g), torch.randn(LAYERS, WIDTH, WIDTH, generator=g)
    y = x @ true
    learner.skip_from_tokens(x, y)
    left = learner.without_skip(x, y).square().sum() / y.square().sum()
    assert 0.01 < left < 0.1  # a ridge of 0.3 shrinks by a quarter, whose square is left
    losses = {}
    for skip in (True, False):
        trainer = Trainer(build("llama"), corpus(), replace(RECIPE, steps=1, skip=skip))
        transcoders = trainer.run(progress=False)
        losses[skip] = float(trainer.history.loss[0])
        assert (transcoders.w_skip[0] is not None) == skip
    assert losses[True] < 0.8 * losses[False]


def test_passes_use_every_token_of_a_buffer_again() -> None:
    trainer = Trainer(build("llama"), corpus(), replace(RECIPE, passes=3, buffer=200, steps=12))
    group = next(trainer.stream.groups())
    count = trainer.stream.batches_in(group)
    buffer = trainer.stream.buffer(0, group)
    assert count % 3 == 0 and buffer.order.shape[0] == 3
    turns = [buffer.batch(number, RECIPE.batch)[0] for number in range(count)]
    for turn in range(3):
        rows = torch.cat(turns[turn * count // 3 : (turn + 1) * count // 3])
        assert len(rows.unique()) == len(rows)
    assert not torch.equal(turns[0], turns[count // 3])
    first = Trainer(build("llama"), corpus(), replace(RECIPE, passes=1, buffer=200)).stream.buffer(0, group)
    assert torch.equal(first.order[0], buffer.order[0])
