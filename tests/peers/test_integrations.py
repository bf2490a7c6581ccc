"""SAELens's transcoders and sparsify's coders on our operations, next to their own results and gradients."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pycircuit as pc
from pycircuit.integrations import sae_lens, sparsify

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
    said = {"d_in": WIDTH, "d_sae": SIZE, "d_out": WIDTH if "Skip" in kind else WRITTEN, "dtype": dtype,
            "apply_b_dec_to_input": False, **more}  # fmt: skip
    return filled(getattr(theirs, kind)(getattr(theirs, f"{kind}Config").from_dict(said)))


def autoencoder(case: str, dtype: str = "float64", **more: Any) -> Any:
    theirs = pytest.importorskip("sae_lens.saes", reason="sae-lens is not installed")
    name = case.split()[0]
    settings = {"d_in": WIDTH, "d_sae": SIZE, "dtype": dtype, **AUTOENCODERS[case], **more}
    return filled(getattr(theirs, name)(getattr(theirs, f"{name}Config")(**settings)))


def coder(dtype: torch.dtype = torch.float64, **said: Any) -> Any:
    theirs = pytest.importorskip("sparsify", reason="eai-sparsify is not installed")
    return filled(theirs.SparseCoder(WIDTH, theirs.SparseCoderConfig(num_latents=SIZE, k=K, **said), dtype=dtype))


def streams(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 9) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weighed(out: Tensor, seed: int) -> Tensor:
    """A sum in which every entry counts differently."""
    g = torch.Generator().manual_seed(seed)
    return (out.double() * torch.randn(out.shape, generator=g, dtype=torch.float64)).sum()


def results(module: Any, run: Callable[[Any, Tensor], tuple[Tensor, ...]], x: Tensor) -> dict[str, Tensor | None]:
    """What comes out, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    outs = run(module, x)
    sum((weighed(out, n) for n, out in enumerate(outs)), torch.zeros(())).backward()
    found: dict[str, Tensor | None] = {f"out {n}": out.detach() for n, out in enumerate(outs)}
    return {**found, "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_saelens(kind: str, way: str) -> None:
    """decode: of activations that are an input themselves, with the gradient of those that are zero."""
    for mode, shape in ((True, (7,)), (False, (2, 3)), (False, ())):
        t = transcoder(kind).train(mode)
        x = streams(*shape)
        if way == "decode":
            x = t.encode(x).detach()
        expected = results(t, WAYS[way], x)
        with sae_lens.accelerate(t):
            got = results(t, WAYS[way], x)
            assert pc.last_run().op in ("encode", "decode", "edge_scores")
        same(got, expected)


@pytest.mark.parametrize("way", ["encode", "forward", "through", "decode"])
@pytest.mark.parametrize("case", AUTOENCODERS)
def test_saelens_autoencoders(case: str, way: str) -> None:
    for mode, shape in ((True, (7,)), (False, (2, 3)), (False, ())):
        sae = autoencoder(case).train(mode)
        x = streams(*shape)
        if way == "decode":
            x = sae.encode(x).detach()
        expected = results(sae, WAYS[way], x)
        with sae_lens.accelerate(sae):
            got = results(sae, WAYS[way], x)
            assert pc.last_run().op in ("encode", "decode", "edge_scores")
        same(got, expected)


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
        written, held = t.run_with_cache(x)
    theirs, expected = t.run_with_cache(x)
    torch.testing.assert_close(written, theirs)
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(held[name], value)


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


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("way", WAYS)
def test_saelens_of_nothing(way: str, shape: tuple[int, ...]) -> None:
    t, x = transcoder("JumpReLUSkipTranscoder"), streams(*shape)
    x = t.encode(x) if way == "decode" else x
    expected = WAYS[way](t, x)
    with sae_lens.accelerate(t):
        for a, b in zip(WAYS[way](t, x), expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def strided(module: Any) -> Any:
    """Weights as loaders give them: transposes of what lies in a file, and a bias between others."""
    for p in module.parameters():
        p.data = p.data.T.contiguous().T if p.ndim == 2 else torch.stack([p.data, p.data], 1)[:, 0]
    return module


@pytest.mark.parametrize("way", WAYS)
def test_saelens_however_weights_and_inputs_lie(way: str) -> None:
    for x in (streams(WIDTH)[:, :WIDTH].T, streams(1).expand(4, WIDTH), streams(3, 2).transpose(0, 1)):
        t = transcoder("JumpReLUSkipTranscoder")
        x = t.encode(x).detach() if way == "decode" else x
        expected = results(t, WAYS[way], x)
        with sae_lens.accelerate(strided(t)):
            same(results(t, WAYS[way], x), expected)


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
        held = getattr(t, name).detach()
        delattr(t, name)
        setattr(t, name, held)
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
        whole = torch.compile(t, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            whole(x)


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
    """The same latents in one order."""
    found = c.encode(x)
    index, order = found.top_indices.sort(-1)
    return found.top_acts.gather(-1, order), index.double() + 0 * found.top_acts, found.pre_acts.detach() + 0 * x.sum()


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
        found = sparsify.encode(c, x)
        index = found.top_indices.clone()
        out = weighed(sparsify.decode(c, found.top_acts, index), 1)
        if change:
            found.top_indices.zero_()
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
    """What comes back runs its own methods, and can be accelerated."""
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
