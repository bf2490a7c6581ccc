"""Tests of SAELens's transcoders on pycircuit's operations against their own results and gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from sparse_modules import (
    KINDS,
    WAYS,
    WIDTH,
    check_accelerated,
    no_further,
    results,
    same,
    streams,
    strided,
    transcoder,
)
from torch import Tensor

from pycircuit.integrations import sae_lens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_saelens(kind: str, way: str) -> None:
    """decode: of activations that are an input themselves, with the gradient of those that are zero."""
    check_accelerated(transcoder(kind), way)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_saelens_normalizes_what_it_reads(norm: str) -> None:
    t = transcoder("SkipTranscoder", normalize_activations=norm)
    expected = results(t, WAYS["forward"], streams(5))
    with sae_lens.accelerate(t):
        same(results(t, WAYS["forward"], streams(5)), expected)


def test_saelens_in_float32() -> None:
    t, x = transcoder("JumpReLUSkipTranscoder", "float32"), streams(9, dtype=torch.float32)
    expected = {way: results(t, WAYS[way], x) for way in ("encode", "forward")}
    with sae_lens.accelerate(t):
        for way, value in expected.items():
            same(results(t, WAYS[way], x), value, 2e-6)


def test_saelens_in_bfloat16() -> None:
    t = transcoder("JumpReLUSkipTranscoder", "bfloat16")
    no_further(t, streams(9, dtype=torch.bfloat16), sae_lens.accelerate)


def test_saelens_functions_without_a_patch() -> None:
    t, x = transcoder("JumpReLUTranscoder"), streams(4)
    acts = t.encode(x)
    torch.testing.assert_close(sae_lens.encode(t, x), acts)
    torch.testing.assert_close(sae_lens.decode(t, acts), t.decode(acts))
    torch.testing.assert_close(sae_lens.forward(t, x), t(x))
    assert "encode" not in vars(t)


@pytest.mark.parametrize(
    "names", [("hook_sae_input", "hook_sae_acts_post", "hook_sae_recons"), ("hook_sae_acts_pre",)], ids=["most", "pre"]
)
def test_saelens_hooks_run(names: tuple[str, ...]) -> None:
    """Wherever they are, and all that a cache holds."""
    t, x = transcoder("SkipTranscoder"), streams(6)
    for name in names:
        getattr(t, name).add_hook(lambda value, hook: value * 1.5 - 0.1)
    expected = {way: results(t, WAYS[way], x) for way in ("encode", "forward", "through")}
    with sae_lens.accelerate(t):
        for way, value in expected.items():
            same(results(t, WAYS[way], x), value)
        written, stored = t.run_with_cache(x)
    theirs, expected = t.run_with_cache(x)
    torch.testing.assert_close(written, theirs)
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(stored[name], value)


def test_saelens_inside_a_model() -> None:
    """SAELens's own model with a transcoder spliced in, with its error term, its cache and its ablation hooks."""
    from sae_lens import HookedSAETransformer

    g = torch.Generator().manual_seed(3)
    model = HookedSAETransformer(
        {"n_layers": 1, "d_model": WIDTH, "n_ctx": 8, "d_head": 6, "n_heads": 2, "d_mlp": 24, "d_vocab": 11,
         "act_fn": "gelu", "device": "cpu", "dtype": torch.float64}
    ).double()  # fmt: skip
    t = transcoder("JumpReLUSkipTranscoder")
    t.cfg.metadata.hook_name = "blocks.0.ln2.hook_normalized"
    t.cfg.metadata.hook_name_out = "blocks.0.hook_mlp_out"
    ids = torch.randint(0, 11, (2, 6), generator=g)
    hook = ("blocks.0.hook_mlp_out.hook_sae_acts_post", lambda value, hook: value.clone().fill_(0.5))

    def run() -> list[Tensor]:
        model.add_sae(t, use_error_term=True)
        logits, cache = model.run_with_cache(ids)
        changed = model.run_with_hooks(ids, fwd_hooks=[hook])
        model.reset_saes()
        return [logits, changed, *(cache[name] for name in sorted(cache))]

    expected = run()
    with sae_lens.accelerate(t):
        got = run()
    assert not torch.allclose(got[0], got[1])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [False, True])
def test_saelens_is_saved_and_copied_as_ever(frozen: bool, tmp_path: Path) -> None:
    t, x = transcoder("JumpReLUTranscoder").requires_grad_(not frozen), streams(6)
    expected = t(x)
    with sae_lens.accelerate(t):
        t.save_model(tmp_path)
        twin = copy.deepcopy(t)
        with torch.no_grad():
            twin.W_dec.mul_(2.0)
        assert not torch.allclose(twin(x), expected)
        torch.testing.assert_close(t(x), expected)
        with pytest.raises(ValueError, match=r"accelerate: JumpReLUTranscoder must have its own encode, got one that"):
            sae_lens.accelerate(t)
    again = type(t).load_from_disk(tmp_path)
    torch.testing.assert_close(again(x), expected)


def test_saelens_is_put_back() -> None:
    t, x = transcoder("Transcoder"), streams(6)
    expected, before = t(x), t.W_enc
    for frozen in (False, True):
        t.requires_grad_(not frozen)
        handle = sae_lens.accelerate(t)
        assert t.W_enc is before and before.T.is_contiguous() is frozen and {"encode", "forward"} <= vars(t).keys()
        torch.testing.assert_close(t(x), expected)
        handle.undo()
        handle.undo()
        assert before.is_contiguous() and not {"encode", "decode", "forward"} & vars(t).keys()
        assert torch.equal(t(x), expected)


def test_saelens_is_not_put_back_over_another_patch() -> None:
    t = transcoder("Transcoder")
    handle = sae_lens.accelerate(t)
    ours, t.encode = t.encode, lambda x: x
    with pytest.raises(ValueError, match=r"undo: Transcoder must still have the encode it was given, got one that was"):
        handle.undo()
    t.encode = ours
    handle.undo()
    assert "encode" not in vars(t)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("way", WAYS)
def test_saelens_of_nothing(way: str, shape: tuple[int, ...]) -> None:
    t, x = transcoder("JumpReLUSkipTranscoder"), streams(*shape)
    x = t.encode(x) if way == "decode" else x
    expected = WAYS[way](t, x)
    with sae_lens.accelerate(t):
        for a, b in zip(WAYS[way](t, x), expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("way", WAYS)
def test_saelens_however_weights_and_inputs_lie(way: str) -> None:
    for x in (streams(WIDTH)[:, :WIDTH].T, streams(1).expand(4, WIDTH), streams(3, 2).transpose(0, 1)):
        t = transcoder("JumpReLUSkipTranscoder")
        x = t.encode(x).detach() if way == "decode" else x
        expected = results(t, WAYS[way], x)
        with sae_lens.accelerate(strided(t)):
            same(results(t, WAYS[way], x), expected)
