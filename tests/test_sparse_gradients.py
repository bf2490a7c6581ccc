"""Gradients of sparse encode and decode against autograd on dense products, and the batch's top k."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from builders import WIDTH

import pycircuit as pc
from pycircuit.training.sparse import Entries, above, batch_top_k, decode, values

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS, SIZE, SLOTS, BANDWIDTH = 21, 40, 3, 0.6


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
    """Dense pre * (pre > theta), with a rectangle as the derivative by theta."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pre, theta)
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < BANDWIDTH / 2) & (pre > 0)
        return grads[0] * (pre > theta), (-theta / BANDWIDTH * near * grads[0]).sum(0)


def entries_of(rule: str, t: dict[str, torch.Tensor]) -> Entries:
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
    """Gradients of a loss with a linear term, a square and a penalty on the values."""
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    loss = (weight * out).sum() + 0.1 * out.square().sum() + torch.tanh(0.7 * value).sum()
    used = {name: leaf for name, leaf in t.items() if name != "theta" or leaf.requires_grad}
    grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    return {name: grad for name, grad in zip(used, grads, strict=True) if grad is not None}


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["reference", "native"])
def test_gradients_equal_those_of_the_dense_form(rule: str, dtype: torch.dtype) -> None:
    dense, sparse = leaves(torch.float64), leaves(dtype)
    value = dense_values(rule, dense)
    expected = gradients(dense, value, torch.einsum("pf,sfd->spd", value, dense["w_dec"]))
    entries = entries_of(rule, sparse)
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


def test_gradients_of_one_leaf_alone() -> None:
    """The loss is a sum, whose gradient is an expanded tensor of stride zero."""
    for only in ("x", "w_enc", "b_enc", "w_dec"):
        results = []
        for sparse in (False, True):
            t = leaves(torch.float64)
            for name, leaf in t.items():
                leaf.requires_grad_(name == only)
            if sparse:
                entries = entries_of("relu", t)
                value = values(t["x"], t["w_enc"], t["b_enc"], entries)
                out = decode(value, t["w_dec"], entries)
            else:
                value = dense_values("relu", t)
                out = torch.einsum("pf,sfd->spd", value, t["w_dec"])
            loss = out.sum() if only == "w_dec" else value.sum()
            loss.backward()
            assert all((leaf.grad is None) == (name != only) for name, leaf in t.items())
            results.append(t[only].grad)
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_jumprelu_thresholds_learn_from_entries_on_both_sides() -> None:
    t = leaves(torch.float64)
    entries = entries_of("jumprelu", t)
    above_theta = entries.pre > t["theta"].detach()[entries.index]
    assert 10 < int(above_theta.sum()) < len(above_theta) - 10


def test_batch_top_k_is_exact_for_any_guess() -> None:
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


@pytest.mark.parametrize(
    ("rule", "positions"), [("relu", 0), ("relu", 5), ("jumprelu", 0), ("jumprelu", 5), ("topk", 0), ("batchtopk", 5)]
)
def test_nothing_active_has_zero_gradients(rule: str, positions: int) -> None:
    """Zero positions: a process without a token of the batch."""
    t = {name: leaf.detach() for name, leaf in leaves(torch.float32).items()}
    t["x"], t["b_enc"] = t["x"][:positions], torch.full((SIZE,), -100.0)
    t = {name: leaf.requires_grad_() for name, leaf in t.items()}
    entries = entries_of(rule, t)
    theta = t["theta"] if rule == "jumprelu" else None
    value = values(t["x"], t["w_enc"], t["b_enc"], entries, theta, BANDWIDTH)
    out = decode(value, t["w_dec"], entries)
    assert value.shape == (0,) and out.shape == (SLOTS, positions, WIDTH)
    used = {name: leaf for name, leaf in t.items() if name != "theta" or theta is not None}
    for name, grad in zip(used, torch.autograd.grad(out.sum() + value.sum(), list(used.values())), strict=True):
        assert grad.shape == t[name].shape and not grad.any()
