"""The trainer: gradients against autograd, what is learned and saved, resumed, shared between processes, judged."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import LAYERS, VOCABULARY, WIDTH, build

import pycircuit as pc
from pycircuit.train import Recipe, Trainer
from pycircuit.train.sparse import Entries, above, batch_top_k, decode, values

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS, SIZE, SLOTS, BANDWIDTH = 21, 40, 3, 0.6
RECIPE = Recipe(features=64, steps=60, k=6, start=12, batch=64, buffer=512, context=24, warmup=5, rate=3e-3, revive=20)


def leaves(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    made = {
        "x": normal(POSITIONS, WIDTH),
        "w_enc": normal(SIZE, WIDTH) / WIDTH**0.5,
        "b_enc": 0.3 * normal(SIZE),
        "theta": normal(SIZE).abs() + 0.3,
        "w_dec": normal(SLOTS, SIZE, WIDTH),
    }
    return {name: t.requires_grad_() for name, t in made.items()}


class Rectangle(torch.autograd.Function):
    """value * (value > theta), dense, with the derivative by theta that a rectangle gives."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pre, theta)
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < BANDWIDTH / 2) & (pre > 0)
        return grads[0] * (pre > theta), (-theta / BANDWIDTH * near * grads[0]).sum(0)


def found(rule: str, t: dict[str, torch.Tensor]) -> Entries:
    x, w_enc, b_enc, theta = (t[n].detach() for n in ("x", "w_enc", "b_enc", "theta"))
    if rule == "jumprelu":
        return above(x, w_enc, b_enc, theta, BANDWIDTH)
    if rule == "batchtopk":
        return batch_top_k(x, w_enc, b_enc, 5 * POSITIONS, 0.0)
    return Entries.of(pc.ops.encode(x, w_enc, b_enc, pc.ReLU() if rule == "relu" else pc.TopK(5)), SIZE)


def dense_values(rule: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    pre = t["x"] @ t["w_enc"].T + t["b_enc"]
    if rule == "jumprelu":
        return Rectangle.apply(pre, t["theta"])
    if rule == "relu":
        return pre.relu()
    ranked = pre.flatten() if rule == "batchtopk" else pre
    least = ranked.topk(5 * POSITIONS if rule == "batchtopk" else 5).values[..., -1:]
    return pre * ((pre >= least) & (pre > 0))


def gradients(t: dict[str, torch.Tensor], value: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss that is no sum of squares, and that a penalty on the values is part of."""
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    loss = (weight * out).sum() + 0.1 * out.square().sum() + torch.tanh(0.7 * value).sum()
    used = {name: leaf for name, leaf in t.items() if name != "theta" or leaf.requires_grad}
    grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    return {name: grad for name, grad in zip(used, grads, strict=True) if grad is not None}


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["reference", "native"])
def test_gradients_are_those_of_the_dense_form(rule: str, dtype: torch.dtype) -> None:
    dense, sparse = leaves(torch.float64), leaves(dtype)
    value = dense_values(rule, dense)
    expected = gradients(dense, value, torch.einsum("pf,sfd->spd", value, dense["w_dec"]))
    entries = found(rule, sparse)
    theta = sparse["theta"] if rule == "jumprelu" else None
    own = values(sparse["x"], sparse["w_enc"], sparse["b_enc"], entries, theta, BANDWIDTH)
    got = gradients(sparse, own, decode(own, sparse["w_dec"], entries))
    assert pc.last_run().implementation == ("reference" if dtype == torch.float64 else "native")
    assert set(got) == set(expected) == set(dense) - ({"theta"} if rule != "jumprelu" else set())
    for name, grad in got.items():
        # float32: sums of up to SLOTS * WIDTH products of size about one, gradients of size about ten.
        error = (grad.double() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < (1e-13 if dtype == torch.float64 else 3e-6), name
        assert expected[name].abs().max() > 0.1


def test_jumprelu_thresholds_learn_from_entries_on_both_sides() -> None:
    t = leaves(torch.float64)
    entries = found("jumprelu", t)
    side = entries.pre > t["theta"].detach()[entries.index]
    assert 10 < int(side.sum()) < len(side) - 10


def test_batch_top_k_is_exact_whatever_is_guessed() -> None:
    t = leaves(torch.float32)
    x, w_enc, b_enc = (t[n].detach() for n in ("x", "w_enc", "b_enc"))
    expected = torch.sort((x @ w_enc.T + b_enc).flatten(), descending=True).values[:60].sort().values
    for guess in (0.0, 0.5, float(expected[0]) + 1e-3, 100.0):
        got = batch_top_k(x, w_enc, b_enc, 60, guess)
        torch.testing.assert_close(got.pre.sort().values, expected)
        assert got.row_ptr[-1] == 60
        assert all((got.index[a:b].diff() > 0).all() for a, b in pairwise(got.row_ptr.tolist()))
    every = batch_top_k(x, w_enc, b_enc, POSITIONS * SIZE, 3.0)
    assert len(every.pre) == int((x @ w_enc.T + b_enc > 0).sum())


def corpus(count: int = 40, length: int = 24) -> torch.Tensor:
    """Text with something to learn: a walk over the vocabulary in a few step sizes."""
    g = torch.Generator().manual_seed(2)
    steps = torch.tensor([1, 2, 7])[torch.randint(0, 3, (count, length), generator=g)]
    return (steps.cumsum(1) + torch.randint(0, VOCABULARY, (count, 1), generator=g)) % VOCABULARY


def explained(t: Any, model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Share of variance per layer, from the model's own streams and the public transcoders: no code of the trainer."""
    replacement = pc.ReplacementModel(model, t)
    missed, there = torch.zeros(2, LAYERS)
    for ids in sequences:
        local = replacement.freeze(ids)
        rest = local.errors[:, 1:]
        written = t.reconstruct(local.features, streams(replacement, ids, t.reads), 1)[:, 1:] + rest
        missed += rest.square().sum((1, 2))
        there += written.square().sum((1, 2)) - written.sum(1).square().sum(1) / written.shape[1]
    return 1 - missed / there


def streams(model: pc.ReplacementModel, ids: torch.Tensor, name: str) -> torch.Tensor:
    from pycircuit.model.capture import capture

    return capture(model.hf_model, model.family, model.weights, ids, (name,)).streams[name]


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_training_explains_most_of_the_variance(kind: str, activation: str) -> None:
    model = build("llama")
    recipe = replace(RECIPE, kind=kind, activation=activation, steps=150, sparsity=1e-3, skip=activation == "topk")
    trainer = Trainer(model, corpus(), recipe)
    t = trainer.run(progress=False)
    h = trainer.history
    assert type(t) is (pc.PerLayerTranscoders if kind == "plt" else pc.CrossLayerTranscoder)
    assert t.reads == ("mlp_in" if kind == "plt" else "resid_mid")
    assert h.loss.shape == (150,) and h.variance.shape == (150, LAYERS)
    assert h.loss[-1] < 0.6 * h.loss[0]
    if activation in ("topk", "batchtopk"):
        assert (h.active == 6).all()
    # What is saved is what was trained: the last batch's share is the corpus's within what batches differ by.
    saved = explained(t, model, corpus()[:12])
    assert (saved - h.variance[-1]).abs().max() < 0.1
    assert saved.min() > 0.4


@pytest.mark.parametrize("reads", ["resid_mid", "mlp_normed", "mlp_in"])
@pytest.mark.parametrize("writes", ["mlp_out", "mlp_raw"])
def test_what_is_learned_from_is_what_the_capture_sees(reads: str, writes: str) -> None:
    """Batches of padded prompts against one prompt at a time, on a family with a norm at every place."""
    from pycircuit.model.capture import capture

    model = build("gemma2")
    trainer = Trainer(model, [[3, 5, 7, 9, 11, 2], [4] * 9], replace(RECIPE, reads=reads, writes=writes))
    source = trainer.source
    x, y = source.activations([torch.tensor([3, 5, 7, 9, 11, 2]), torch.tensor([4, 8, 1, 1, 6, 7, 8, 9, 9])])
    at = 0
    for ids in ([3, 5, 7, 9, 11, 2], [4, 8, 1, 1, 6, 7, 8, 9, 9]):
        one = capture(model, source.family, source.weights, torch.tensor(ids), (reads, writes)).streams
        end = at + len(ids) - 1
        torch.testing.assert_close(x[:, at:end], one[reads][:, 1:], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(y[:, at:end], one[writes][:, 1:], atol=2e-5, rtol=1e-5)
        at = end
    assert at == x.shape[1]
