"""Tests of sparsify's coders on pycircuit's operations against their own results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_modules import SIZE, WIDTH, K, coder, results, same, streams, strided, weighed
from torch import Tensor

import pycircuit as pc
from pycircuit.integrations import sparsify

CODERS: dict[str, dict[str, Any]] = {
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
    "autoencoder": {"normalize_decoder": False},
    "multi": {"transcode": True, "multi_topk": True},
}


def trained(c: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Everything that their forward gives for a target, with dead latents."""
    dead = torch.zeros(SIZE, dtype=torch.bool)
    dead[::3] = True
    out = c(x, streams(len(x), seed=4), dead_mask=dead)
    return out.sae_out, out.fvu, out.auxk_loss, out.multi_topk_fvu


def encoded(c: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Encode, with latents in ascending order."""
    output = c.encode(x)
    index, order = output.top_indices.sort(-1)
    return (
        output.top_acts.gather(-1, order),
        index.double() + 0 * output.top_acts,
        output.pre_acts.detach() + 0 * x.sum(),
    )


CODER_WAYS: dict[str, Callable[[Any, Tensor], tuple[Tensor, ...]]] = {
    "encode": encoded, "forward": lambda c, x: (c(x).sae_out,), "trained": trained,
}  # fmt: skip


@pytest.mark.parametrize("way", CODER_WAYS)
@pytest.mark.parametrize("kind", CODERS)
def test_sparsify(kind: str, way: str) -> None:
    c, x = coder(**CODERS[kind]), streams(7)
    expected = results(c, CODER_WAYS[way], x)
    with sparsify.accelerate(c):
        same(results(c, CODER_WAYS[way], x), expected)
    assert not {"encode", "decode"} & vars(c).keys()
    same(results(c, CODER_WAYS[way], x), expected)


@pytest.mark.parametrize("off", ["encoder.weight", "encoder.bias", "W_dec", "b_dec", "W_skip"])
def test_sparsify_weights_that_are_not_trained(off: str) -> None:
    c, x = coder(transcode=True, skip_connection=True), streams(5)
    c.get_parameter(off).requires_grad_(False)
    expected = results(c, CODER_WAYS["forward"], x)
    with sparsify.accelerate(c):
        same(results(c, CODER_WAYS["forward"], x), expected)
        assert c.get_parameter(off).grad is None


def test_sparsify_however_weights_and_inputs_lie() -> None:
    for x in (streams(WIDTH)[:, :WIDTH].T, streams(1).expand(4, WIDTH), streams(8)[::2]):
        c = coder(transcode=True, skip_connection=True)
        expected = results(c, CODER_WAYS["forward"], x)
        with sparsify.accelerate(strided(c)):
            same(results(c, CODER_WAYS["forward"], x), expected)


def test_sparsify_of_nothing() -> None:
    c, x = coder(transcode=True, skip_connection=True), streams(0)
    expected = c(x)
    with sparsify.accelerate(c):
        got = c(x)
    assert [t.shape for t in got] == [t.shape for t in expected] and got.sae_out.dtype == expected.sae_out.dtype


def test_sparsify_sums_of_activations_have_gradients() -> None:
    """A sparsity loss: the gradient of a sum is one number, stretched."""
    c, x = coder(transcode=True), streams(5)
    expected = results(c, lambda c, x: (c.encode(x).top_acts.sum()[None],), x)
    with sparsify.accelerate(c):
        same(results(c, lambda c, x: (c.encode(x).top_acts.sum()[None],), x), expected)


def test_sparsify_indices_may_be_written_to_before_backward() -> None:
    c, x = coder(transcode=True), streams(5).requires_grad_()
    grads = []
    for change in (False, True):
        output = sparsify.encode(c, x)
        index = output.top_indices.clone()
        out = weighed(sparsify.decode(c, output.top_acts, index), 1)
        if change:
            output.top_indices.zero_()
            index.zero_()
        grads.append(torch.autograd.grad(out, [x, c.W_dec, c.encoder.weight]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and grads[0][0].any()


def test_sparsify_latents_named_twice() -> None:
    c = coder(transcode=True)
    acts = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[1, 1, 2, 5], [0, 0, 0, 0], [9, 3, 3, 1]], dtype=torch.int32)
    grads = []
    for decode in (c.decode, lambda *args: sparsify.decode(c, *args)):
        grads.append(torch.autograd.grad(weighed(decode(acts, index), 2), [acts, c.W_dec, c.b_dec]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_sparsify_in_inference_mode() -> None:
    c, x = coder(transcode=True), streams(5)
    expected, pre = c(x).sae_out, c.encode(x).pre_acts
    with torch.inference_mode(), sparsify.accelerate(c):
        torch.testing.assert_close(c(x.clone()).sae_out, expected)
        torch.testing.assert_close(c.encode(x.clone()).pre_acts.clone(), pre.detach())


def test_sparsify_is_pickled_as_ever(tmp_path: Path) -> None:
    """An unpickled coder runs its own methods, and can be accelerated."""
    c, x = coder(transcode=True), streams(5)
    expected = c(x).sae_out
    with sparsify.accelerate(c):
        torch.save(c, tmp_path / "c.pt")
        c.save_to_disk(tmp_path / "c")
    assert torch.equal(type(c).load_from_disk(tmp_path / "c")(x).sae_out, expected)
    again = torch.load(tmp_path / "c.pt", weights_only=False)
    assert torch.equal(again(x).sae_out, expected)
    with sparsify.accelerate(again):
        torch.testing.assert_close(again(x).sae_out, expected)
        assert pc.last_run().op == "decode"


def test_sparsify_in_float32() -> None:
    c, x = coder(torch.float32, transcode=True, skip_connection=True), streams(6, dtype=torch.float32)
    expected = results(c, CODER_WAYS["forward"], x)
    with sparsify.accelerate(c):
        same(results(c, CODER_WAYS["forward"], x), expected, 2e-6)


def test_sparsify_in_bfloat16() -> None:
    c, x = coder(torch.bfloat16, transcode=True, skip_connection=True), streams(6, dtype=torch.bfloat16)
    written, theirs = sparsify.decode(c, *sparsify.encode(c, x)[:2]), c.decode(*c.encode(x)[:2])
    assert written.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(written, theirs, rtol=0.05, atol=0.05)


def test_sparsify_functions_without_a_patch() -> None:
    """Also of latents in their order, and over more dimensions than theirs takes."""
    c, x = coder(transcode=True), streams(6)
    theirs = c.encode(x)
    got = sparsify.encode(c, x)
    assert type(got) is type(theirs)
    torch.testing.assert_close(sparsify.decode(c, theirs.top_acts, theirs.top_indices), c.decode(*theirs[:2]))
    torch.testing.assert_close(sparsify.decode(c, *got[:2]), c.decode(*theirs[:2]))
    deep = sparsify.encode(c, x.view(2, 3, WIDTH))
    assert deep.top_acts.shape == (2, 3, K) and deep.pre_acts.shape == (2, 3, SIZE)
    torch.testing.assert_close(sparsify.decode(c, *deep[:2]).view(6, WIDTH), c.decode(*theirs[:2]))


def test_sparsify_with_too_few_positive_latents() -> None:
    """Zeros for the rest, at latents of their own, which learn from them as theirs do."""
    c, x = coder(transcode=True), streams(6)
    with torch.no_grad():
        c.encoder.bias.fill_(-1.2)
    theirs, got = c.encode(x), sparsify.encode(c, x)
    assert 0 < (theirs.top_acts > 0).sum() < theirs.top_acts.numel()
    torch.testing.assert_close(got.top_acts.sort(-1).values, theirs.top_acts.sort(-1).values)
    assert all(len(set(row)) == K for row in got.top_indices.tolist())
    torch.testing.assert_close(sparsify.decode(c, *got[:2]), c.decode(*theirs[:2]))
    silent = got.top_acts == 0
    got.top_acts.sum().backward()
    counts = torch.bincount(got.top_indices.flatten(), minlength=SIZE)
    assert torch.equal(c.encoder.bias.grad, counts.double()) and silent.any()


def test_sparsify_pre_activations_are_made_when_looked_at() -> None:
    c, x = coder(transcode=True), streams(6)
    expected = c.encode(x).pre_acts.detach()
    pre = sparsify.encode(c, x).pre_acts
    assert pre._value is None and isinstance(pre, Tensor)
    assert pre.shape == expected.shape and torch.equal(torch.cat([pre, pre]), torch.cat([expected] * 2))
    assert (pre.numpy() == expected.numpy()).all()
    later = sparsify.encode(c, x).pre_acts
    with torch.no_grad():
        c.encoder.weight.mul_(2.0)
    with pytest.raises(ValueError, match=r"encode: pre_acts must be looked at before x or the weights change"):
        later.sum()


def test_what_sparsify_forms_are_refused() -> None:
    with pytest.raises(TypeError, match=r"accelerate: coder must be sparsify's SparseCoder, got Linear"):
        sparsify.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"accelerate: cfg.activation must be topk, got 'groupmax', which pycircuit"):
        sparsify.accelerate(coder(activation="groupmax"))
    c = coder(transcode=True)
    with pytest.raises(ValueError, match=r"must have one shape \[..., k\], got \[2\] and \[3\]"):
        sparsify.decode(c, torch.zeros(2), torch.zeros(3, dtype=torch.int64))
    c.cfg.k = SIZE + 1
    with pytest.raises(ValueError, match=r"encode: cfg.k must be from 1 to the 40 latents, got 41"):
        sparsify.encode(c, streams(2))
    c.W_dec = None
    with pytest.raises(ValueError, match=r"decode: coder must have a decoder, got W_dec=None"):
        sparsify.decode(c, torch.zeros(2), torch.zeros(2, dtype=torch.int64))
