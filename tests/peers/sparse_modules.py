"""Random modules of SAELens and sparsify, and comparisons of their results and gradients."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pycircuit as pc
from pycircuit.integrations import sae_lens

WIDTH, WRITTEN, SIZE, K = 12, 10, 40, 5


KINDS = ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder")


AUTOENCODERS: dict[str, dict[str, Any]] = {
    "StandardSAE": {},
    "StandardSAE reads past its bias": {"apply_b_dec_to_input": True},
    "JumpReLUSAE": {},
    "TopKSAE": {"k": K},
    "TopKSAE by decoder norms": {"k": K, "rescale_acts_by_decoder_norm": True},
}


def filled(module: Any, seed: int = 0) -> Any:
    """Every parameter random; some thresholds are below zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 3)
    return module


def transcoder(kind: str, dtype: str = "float64", **more: Any) -> Any:
    theirs = pytest.importorskip("sae_lens.saes.transcoder", reason="sae-lens is not installed")
    settings = {"d_in": WIDTH, "d_sae": SIZE, "d_out": WIDTH if "Skip" in kind else WRITTEN, "dtype": dtype,
            "apply_b_dec_to_input": False, **more}  # fmt: skip
    return filled(getattr(theirs, kind)(getattr(theirs, f"{kind}Config").from_dict(settings)))


def autoencoder(case: str, dtype: str = "float64", **more: Any) -> Any:
    theirs = pytest.importorskip("sae_lens.saes", reason="sae-lens is not installed")
    name = case.split()[0]
    settings = {"d_in": WIDTH, "d_sae": SIZE, "dtype": dtype, **AUTOENCODERS[case], **more}
    return filled(getattr(theirs, name)(getattr(theirs, f"{name}Config")(**settings)))


def coder(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    theirs = pytest.importorskip("sparsify", reason="eai-sparsify is not installed")
    return filled(theirs.SparseCoder(WIDTH, theirs.SparseCoderConfig(num_latents=SIZE, k=K, **settings), dtype=dtype))


def streams(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 9) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weighed(out: Tensor, seed: int) -> Tensor:
    """A sum in which every entry counts differently."""
    g = torch.Generator().manual_seed(seed)
    return (out.double() * torch.randn(out.shape, generator=g, dtype=torch.float64)).sum()


def results(module: Any, run: Callable[[Any, Tensor], tuple[Tensor, ...]], x: Tensor) -> dict[str, Tensor | None]:
    """Outputs, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    outs = run(module, x)
    sum((weighed(out, n) for n, out in enumerate(outs)), torch.zeros(())).backward()
    values: dict[str, Tensor | None] = {f"out {n}": out.detach() for n, out in enumerate(outs)}
    return {**values, "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        ours = got[name]
        if value is None:
            assert ours is None, name
        elif ours is None:  # a gradient of nothing, which theirs fills with zeros
            assert not value.any(), name
        else:
            assert (ours.dtype, ours.shape) == (value.dtype, value.shape), name
            torch.testing.assert_close(ours, value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert any(v is not None and v.abs().sum() > 0 for v in expected.values())


WAYS: dict[str, Callable[[Any, Tensor], tuple[Tensor, ...]]] = {
    "encode": lambda t, x: (t.encode(x),),
    "forward": lambda t, x: (t(x),),
    "forward_with_activations": lambda t, x: t.forward_with_activations(x),
    "through": lambda t, x: (t.decode(t.encode(x)),),
    "decode": lambda t, x: (t.decode(x),),
}


def no_further(module: Any, x: Tensor, patch: Callable[[Any], Any]) -> None:
    """In bfloat16: the type stays, and ours is as near to float64 as theirs is."""
    exact = results(copy.deepcopy(module).to(torch.float64), WAYS["forward"], x.double())
    theirs = results(module, WAYS["forward"], x)
    with patch(module):
        ours = results(module, WAYS["forward"], x)
    for name, truth in exact.items():
        a, b = ours[name], theirs[name]
        if truth is not None and a is not None and b is not None:
            assert a.dtype == b.dtype == torch.bfloat16
            assert (a - truth).norm() <= 1.1 * (b - truth).norm() + 1e-9, name


def strided(module: Any) -> Any:
    """Weights as loaders give them: transposes of what lies in a file, and a bias between others."""
    for p in module.parameters():
        p.data = p.data.T.contiguous().T if p.ndim == 2 else torch.stack([p.data, p.data], 1)[:, 0]
    return module


def check_accelerated(module: Any, way: str) -> None:
    """Assert that an accelerated SAELens module gives its own values and gradients, in training and at rest."""
    for mode, shape in ((True, (7,)), (False, (2, 3)), (False, ())):
        module.train(mode)
        x = streams(*shape)
        if way == "decode":
            x = module.encode(x).detach()
        expected = results(module, WAYS[way], x)
        with sae_lens.accelerate(module):
            accelerated = results(module, WAYS[way], x)
            assert pc.last_run().op in ("encode", "decode", "edge_scores")
        same(accelerated, expected)
