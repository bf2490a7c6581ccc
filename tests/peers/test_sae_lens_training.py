"""Tests of SAELens's transcoders on pycircuit's operations in training, autograd, compilation and hooks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from sparse_modules import WAYS, WIDTH, results, same, streams, transcoder, weighed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pycircuit as pc
from pycircuit.integrations import sae_lens


@pytest.mark.parametrize("fused", [False, True])
def test_saelens_learns_alike(fused: bool) -> None:
    """Some steps of one Adam without, with and without again: its state lies as the weights did."""
    ways = {}
    for fast in (False, True):
        t = transcoder("SkipTranscoder")
        adam = torch.optim.Adam(t.parameters(), 1e-2, fused=fused)
        for step in range(6):
            adam.zero_grad()
            with sae_lens.accelerate(t) if fast and 2 <= step < 4 else nullcontext():
                (t(streams(8, seed=step)) - streams(8, seed=step + 100)).square().mean().backward()
                adam.step()
        ways[fast] = t.state_dict()
    same(ways[True], ways[False], 1e-8)


def test_saelens_state_is_the_weights_themselves() -> None:
    t = transcoder("Transcoder").requires_grad_(False)
    with sae_lens.accelerate(t):
        t.state_dict()["W_enc"].zero_()
        assert not t.W_enc.any()


@pytest.mark.parametrize("off", ["W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold"])
def test_saelens_weights_that_are_not_trained(off: str) -> None:
    t, x = transcoder("JumpReLUSkipTranscoder"), streams(5)
    getattr(t, off).requires_grad_(False)
    for way in ("encode", "forward", "through"):
        expected = results(t, WAYS[way], x)
        with sae_lens.accelerate(t):
            same(results(t, WAYS[way], x), expected)
            assert getattr(t, off).grad is None


def test_saelens_weights_that_are_no_parameters() -> None:
    """As some tools leave them, to put other tensors in their place."""
    t, x = transcoder("JumpReLUSkipTranscoder"), streams(5)
    for name in ("W_skip", "threshold"):
        tensor = getattr(t, name).detach()
        delattr(t, name)
        setattr(t, name, tensor)
    expected = t(x)
    with sae_lens.accelerate(t):
        torch.testing.assert_close(t(x), expected)


def test_saelens_modules_in_place_of_hooks() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    t, x = transcoder("Transcoder"), streams(5)
    for name in ("hook_sae_acts_post", "hook_sae_acts_pre"):
        setattr(t, name, Doubled())
        expected = results(t, WAYS["forward"], x)
        with sae_lens.accelerate(t):
            same(results(t, WAYS["forward"], x), expected)


def test_saelens_with_its_hooks_disabled() -> None:
    """As its error terms run it."""
    t, x = transcoder("Transcoder"), streams(5)
    for name in ("hook_sae_acts_pre", "hook_sae_acts_post"):
        getattr(t, name).add_hook(lambda value, hook: value * 1.5)
    from sae_lens.saes.sae import _disable_hooks

    with _disable_hooks(t):
        expected = t(x)
        with sae_lens.accelerate(t):
            torch.testing.assert_close(t(x), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saelens_under_autocast(dtype: str) -> None:
    """The types are theirs, the sums ours."""
    t = transcoder("JumpReLUSkipTranscoder", dtype)
    x = streams(6, dtype=getattr(torch, dtype))
    with sae_lens.accelerate(t):
        alone = t.encode(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(t.encode(x), alone)
            got = results(t, WAYS["forward"], x)
    with torch.autocast("cpu", torch.bfloat16):
        same(got, results(t, WAYS["forward"], x), 0.1)


def test_saelens_in_inference_mode() -> None:
    t, x = transcoder("JumpReLUSkipTranscoder"), streams(5)
    expected = t(x)
    with torch.inference_mode(), sae_lens.accelerate(t):
        torch.testing.assert_close(t(x.clone()), expected)
        torch.testing.assert_close(t.decode(t.encode(x.clone())) + x @ t.W_skip.T, expected)


def test_saelens_across_the_patchs_ends() -> None:
    """Forward on one side, backward on the other; within, activations that are made again."""
    t, x = transcoder("JumpReLUSkipTranscoder").requires_grad_(False), streams(5).requires_grad_()
    expected = torch.autograd.grad(weighed(t(x), 0), x)[0]
    with sae_lens.accelerate(t):
        ours = weighed(t(x), 0)
        again = weighed(checkpoint(t, x, use_reentrant=False), 0)
        torch.testing.assert_close(torch.autograd.grad(again, x)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(ours, x)[0], expected)
    theirs = weighed(t(x), 0)
    with sae_lens.accelerate(t):
        torch.testing.assert_close(torch.autograd.grad(theirs, x)[0], expected)


def test_saelens_compiled() -> None:
    """A compiler leaves ours alone."""
    t, x = transcoder("JumpReLUSkipTranscoder"), streams(5)
    expected = results(t, WAYS["forward"], x)
    with sae_lens.accelerate(t):
        compiled = torch.compile(t, backend="eager")
        same(results(t, lambda _, x: (compiled(x),), x), expected)
        assert pc.last_run() is not None
        compiled_in_full = torch.compile(t, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled_in_full(x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, by jvp
def test_what_saelens_derivatives_are_refused() -> None:
    t, x = transcoder("Transcoder"), streams(4)
    with sae_lens.accelerate(t):
        for run in (lambda: torch.func.jvp(t, (x,), (x,)), lambda: torch.func.grad(lambda x: t(x).sum())(x),
                    lambda: torch.func.vmap(t)(x)):  # fmt: skip
            with pytest.raises(TypeError, match=r"encode: x must be a tensor with memory of its own, got one without"):
                run()
        for way in (t, lambda x: t.decode(t.encode(x))):
            x.requires_grad_()
            once = torch.autograd.grad(way(x).square().sum(), x, create_graph=True)[0]
            with pytest.raises(RuntimeError, match="differentiate twice"):
                once.sum().backward()


def test_what_saelens_forms_are_refused() -> None:
    t = transcoder("Transcoder")
    with pytest.raises(TypeError, match=r"accelerate: sae must be one of SAELens's Transcoder, .* got Linear"):
        sae_lens.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"must end with the 40 features of W_dec, got shape \[3\]"):
        sae_lens.decode(t, torch.zeros(3))
    with pytest.raises(ValueError, match=r"encode: pre-activations must not be NaN"):
        sae_lens.encode(t, torch.full((1, WIDTH), torch.nan, dtype=torch.float64))
    t.activation_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match=r"accelerate: sae.activation_fn must be the ReLU .* got GELU"):
        sae_lens.accelerate(t)
    t.activation_fn = torch.nn.ReLU()
    t.activation_fn.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match=r"must be the ReLU that SAELens gives it, got ReLU with a hook"):
        sae_lens.accelerate(t)
    assert "encode" not in vars(t)
