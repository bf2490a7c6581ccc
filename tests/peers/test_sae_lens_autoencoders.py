"""Tests of SAELens's autoencoders on pycircuit's operations against their own results and gradients."""

from __future__ import annotations

import pytest
import torch
from sparse_modules import (
    AUTOENCODERS,
    SIZE,
    WAYS,
    WIDTH,
    autoencoder,
    check_accelerated,
    no_further,
    results,
    same,
    streams,
)
from torch import Tensor

from pycircuit.integrations import sae_lens


@pytest.mark.parametrize("way", ["encode", "forward", "through", "decode"])
@pytest.mark.parametrize("case", AUTOENCODERS)
def test_saelens_autoencoders(case: str, way: str) -> None:
    check_accelerated(autoencoder(case), way)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("case", AUTOENCODERS)
def test_saelens_autoencoders_scale_back_what_they_normalize(case: str, norm: str) -> None:
    sae = autoencoder(case, normalize_activations=norm)
    expected = results(sae, WAYS["forward"], streams(5))
    with sae_lens.accelerate(sae):
        same(results(sae, WAYS["forward"], streams(5)), expected)


def test_saelens_autoencoders_of_heads() -> None:
    """Streams of [..., heads, head width] come back as such."""
    sae, x = autoencoder("JumpReLUSAE", reshape_activations="hook_z"), streams(5).view(5, 3, 4)
    expected = results(sae, WAYS["forward"], x)
    assert expected["out 0"].shape == (5, 3, 4)
    with sae_lens.accelerate(sae):
        same(results(sae, WAYS["forward"], x), expected)


@pytest.mark.parametrize("case", AUTOENCODERS)
def test_saelens_autoencoders_hooks_cache_and_error_term(case: str) -> None:
    sae, x = autoencoder(case), streams(6)
    names = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output")

    def runs() -> list[Tensor]:
        written, cache = sae.run_with_cache(x)
        hooked = [sae.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: value * 1.5 - 0.1)]) for name in names]
        sae._use_error_term = True  # its setter warns: models set it when they splice one in
        exact, errors = sae.run_with_cache(x)
        sae._use_error_term = False
        return [written, *hooked, exact, *(cache[name] for name in names), errors["hook_sae_error"]]

    expected = runs()
    with sae_lens.accelerate(sae):
        got = runs()
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", AUTOENCODERS)
def test_saelens_autoencoders_in_bfloat16(case: str) -> None:
    no_further(autoencoder(case, "bfloat16"), streams(9, dtype=torch.bfloat16), sae_lens.accelerate)


def test_saelens_autoencoders_that_are_refused() -> None:
    """By a name each, with the names of those that are served."""
    theirs = pytest.importorskip("sae_lens.saes", reason="sae-lens is not installed")
    for name in ("GatedSAE", "AbsTopKSAE", "StandardTrainingSAE", "TopKTrainingSAE", "BatchTopKTrainingSAE"):
        sae = getattr(theirs, name)(getattr(theirs, f"{name}Config")(d_in=WIDTH, d_sae=SIZE))
        with pytest.raises(TypeError, match=rf"accelerate: sae must be one of .*StandardSAE, .*, got {name}"):
            sae_lens.accelerate(sae)
        assert "encode" not in vars(sae)
    sae = autoencoder("TopKSAE")
    sae.activation_fn.use_sparse_activations = True
    with pytest.raises(ValueError, match=r"must be the TopK that SAELens gives it, got TopK with a hook or sparse"):
        sae_lens.accelerate(sae)
