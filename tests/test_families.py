"""Every family on a tiny random model: the frozen model must be the model, in every step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import CONFIGS, LAYERS, VOCABULARY, WIDTH, WINDOW, WINDOWED, build, prompt

import pycircuit as pc
from pycircuit.model import attention_choice, families, frozen
from pycircuit.model.agreement import disagreement, relative_error
from pycircuit.model.capture import STREAMS, Captured, capture
from pycircuit.model.causal_attention import sliding_window
from pycircuit.model.families import FAMILIES, family_of
from pycircuit.model.weights import read_weights
from pycircuit.transcoders.types import READS

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}
TYPES = pytest.mark.parametrize("dtype", list(EXACT), ids=["float32", "float64"])
EVERY = pytest.mark.parametrize("name", list(CONFIGS))


def freeze(model: Any, stored: bool = True, **options: Any) -> Captured:
    family = family_of(model)
    return capture(model, family, read_weights(model, family), prompt(), STREAMS, stored, **options)


def eager_logits(model: Any) -> torch.Tensor:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(prompt()[None]).logits[0]
    model.set_attn_implementation(before)
    return logits


def transcoders(dtype: torch.dtype = torch.float32) -> pc.PerLayerTranscoders:
    g = torch.Generator().manual_seed(5)
    w_enc, w_dec = (torch.randn(LAYERS, 20, WIDTH, generator=g).to(dtype) for _ in range(2))
    return pc.PerLayerTranscoders(w_enc, torch.zeros(LAYERS, 20, dtype=dtype), w_dec, activation=pc.TopK(3))


def test_every_family_has_a_tiny_model() -> None:
    assert set(FAMILIES) == set(CONFIGS) - {"gpt_neox_sequential"}


@TYPES
@EVERY
def test_logits_equal_eager(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    # transformers computes norms and softmax of float64 models in float32.
    assert relative_error(freeze(model).model.logits(), eager_logits(model)) < 1e-5


@TYPES
@EVERY
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "recomputed"])
def test_the_stream_adds_up(name: str, dtype: torch.dtype, stored: bool) -> None:
    """Embeddings, frozen attention and MLP outputs give back every stream, the last one and the logits."""
    captured = freeze(build(name, dtype), stored)
    model, s = captured.model, captured.streams
    *layers, (last, _, _) = model.streams(s["mlp_raw"])
    for i, streams in enumerate(layers):
        for stream, key in zip(streams, ("resid_in", "attention_out", "resid_mid"), strict=True):
            assert relative_error(stream, s[key][i]) < EXACT[dtype], (i, key)
    assert relative_error(last, model.final_stream) < EXACT[dtype]
    assert relative_error(replace(model, final_stream=last).logits(), model.logits()) < EXACT[dtype]


@TYPES
@EVERY
def test_every_step_agrees(name: str, dtype: torch.dtype) -> None:
    errors = disagreement(freeze(build(name, dtype)))
    assert set(errors) == {"attention", "post_mlp_norm", "order", "mlp_input"}
    assert max(errors.values()) < EXACT[dtype], errors


@EVERY
def test_reads_are_linear_in_the_stream(name: str) -> None:
    captured = freeze(build(name, torch.float64))
    for i, layer in enumerate(captured.model.layers):
        middle = captured.streams["resid_mid"][i]
        for reads in READS:
            norm = layer.read_norm(reads)
            read = middle if norm is None else norm.forward(middle)
            assert relative_error(read, captured.streams[reads][i]) < 1e-12, (i, reads)


@EVERY
def test_stored_equals_recomputed(name: str) -> None:
    model = build(name, torch.float64)
    stored, recomputed = freeze(model, True).model, freeze(model, False).model
    for a, b in zip(stored.layers, recomputed.layers, strict=True):
        assert isinstance(a.attention, pc.ops.StoredAttention)
        assert isinstance(b.attention, pc.ops.RecomputedAttention)
        n = stored.positions
        torch.testing.assert_close(b.attention.weights(n), a.attention.weights(n), rtol=1e-12, atol=1e-14)
        for begin, end in ((0, n), (5, 9), (n - 1, n)):
            rows = b.attention.pattern_rows(torch.arange(begin, end), end)
            torch.testing.assert_close(
                rows, a.attention.pattern_rows(torch.arange(begin, end), end), rtol=1e-12, atol=1e-14
            )


@pytest.mark.parametrize("name", WINDOWED)
def test_window_is_shorter_than_the_prompt(name: str) -> None:
    attention = [layer.attention for layer in freeze(build(name), False).model.layers]
    windows = {a.window for a in attention if isinstance(a, pc.ops.RecomputedAttention)}
    assert WINDOW in windows <= {0, WINDOW}


def test_everything_that_a_family_can_have_is_on() -> None:
    first = {name: freeze(build(name), False).model.layers[0].attention for name in ("gemma2", "gpt_oss", "llama")}
    assert first["gemma2"].softcap == 1.5
    assert first["gpt_oss"].sinks is not None and first["gpt_oss"].sinks.abs().min() > 0
    assert first["llama"].groups == 2 and first["llama"].heads == 4
    assert freeze(build("gemma2")).model.final_softcap == 2.0
    for name in ("gpt2", "llama", "gpt_oss", "gemma2", "qwen2"):
        assert freeze(build(name)).model.layers[0].b_v is not None
    assert freeze(build("gpt_neox")).model.layers[0].parallel
    assert not freeze(build("gpt_neox_sequential")).model.layers[0].parallel
    assert freeze(build("gpt2")).model.position_part is not None


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "recomputed"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "olmo2", "gpt_oss"])
def test_blocks_of_queries_change_nothing(name: str, stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, torch.float64)
    expected = freeze(model, stored).model.final_stream
    for block in (1, 200):
        monkeypatch.setattr(frozen, "BLOCK", block)
        blocked = freeze(model, stored)
        assert relative_error(blocked.model.final_stream, expected) < 1e-13
        *_, (last, _, _) = blocked.model.streams(blocked.streams["mlp_raw"])
        assert relative_error(last, expected) < 1e-12


@EVERY
def test_norms_transpose(name: str) -> None:
    """<G, N(x) - bias> = <back(G), x>, at chosen positions."""
    captured = freeze(build(name, torch.float64))
    g, n = torch.Generator().manual_seed(2), captured.model.positions
    layer = captured.model.layers[1]
    norms = [layer.attention_norm, layer.post_attention_norm, layer.mlp_norm, layer.post_mlp_norm]
    norms += [layer.read_norm("mlp_normed"), captured.model.final_norm]
    x = torch.randn(n, WIDTH, generator=g, dtype=torch.float64)
    positions = torch.tensor([0, 3, 3, n - 1])
    gradient = torch.randn(4, WIDTH, generator=g, dtype=torch.float64)
    for norm in filter(None, norms):
        linear = norm.forward(x) - (0 if norm.bias is None else norm.bias)
        back = norm.back(gradient, positions)
        torch.testing.assert_close((gradient * linear[positions]).sum(1), (back * x[positions]).sum(1))
        torch.testing.assert_close(norm.back(x), norm.back(x, torch.arange(n)), rtol=0, atol=0)
        torch.testing.assert_close(norm.forward(x[3:5], begin=3), norm.forward(x)[3:5], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "gpt2"])
def test_attend_back_is_the_transpose(name: str) -> None:
    """The op that walks gradients down uses the same pattern as the walk up: <Y, A V> = <A^T Y, V>."""
    for stored in (True, False):
        model = freeze(build(name, torch.float64), stored).model
        layer, n = model.layers[0], model.positions
        g = torch.Generator().manual_seed(3)
        value = torch.randn(layer.kv_heads, n, layer.head_width, generator=g, dtype=torch.float64)
        y = torch.randn(n, layer.heads, layer.head_width, generator=g, dtype=torch.float64)
        z = pc.ops.attend_back(y, torch.tensor([0, n]), layer.attention)
        up = frozen.mix(layer.attention, value)
        torch.testing.assert_close((y.transpose(0, 1) * up).sum(), (z.transpose(0, 1) * value).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@EVERY
def test_half_precision_adds_up_in_float32(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    captured = freeze(model)
    assert captured.model.dtype == torch.float32 and captured.model.unembedding.dtype == dtype
    assert max(disagreement(captured).values()) < 1e-5
    *_, (last, _, _) = captured.model.streams(captured.streams["mlp_raw"])
    assert relative_error(last, captured.model.final_stream) < 1e-5
    # 8 bits of mantissa, rounded at every step of three layers.
    assert relative_error(captured.model.logits(), eager_logits(model).float()) < 0.1


def test_one_token() -> None:
    model = build("gemma2")
    family = family_of(model)
    captured = capture(model, family, read_weights(model, family), torch.tensor([7]), STREAMS)
    assert max(disagreement(captured).values()) < 1e-5


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama")
    before = model.config._attn_implementation
    freeze(model)
    assert model.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.model.layers[1].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        freeze(model)
    assert model.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert attention_choice.current_choice() is None


def test_nothing_holds_a_tape() -> None:
    local = pc.ReplacementModel(build("llama"), transcoders()).freeze(prompt())
    tensors = [v for layer in local.model.layers for v in vars(layer).values() if isinstance(v, torch.Tensor)]
    tensors += [local.errors, local.model.embeddings, local.model.final_stream, local.model.unembedding]
    assert not any(t.requires_grad for t in tensors)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_inputs_that_require_gradients(name: str) -> None:
    """As adapters are trained: the embedding's output asks for a gradient, and no trace has one."""
    model = build(name)
    expected = pc.attribute(pc.ReplacementModel(model, transcoders()), prompt(), max_features=5, progress=False)
    model.enable_input_require_grads()
    for layer in model.get_submodule(FAMILIES[name].layers):
        layer.mlp.register_forward_hook(lambda module, args, out: out.requires_grad_())
    opened = pc.ReplacementModel(model, transcoders())
    graph = pc.attribute(opened, prompt(), max_features=5, progress=False)
    assert torch.equal(graph.rows.weight, expected.rows.weight) and not graph.rows.weight.requires_grad
    assert not any(t.requires_grad for t in vars(opened.freeze(prompt()).model).values() if torch.is_tensor(t))


def test_experts_that_have_no_float64() -> None:
    """transformers' default for experts is torch's grouped product; the error names the setting that helps."""
    model = build("gpt_oss", torch.float64)
    if not hasattr(model, "set_experts_implementation"):
        return  # before transformers 5 experts were always computed one by one
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match=r"float64 and grouped_mm.*call model\.set_experts_implementation\('eager'\)"):
        pc.ReplacementModel(model, transcoders(torch.float64))
    model.set_experts_implementation("eager")
    pc.ReplacementModel(model, transcoders(torch.float64))


def test_training_mode_raises() -> None:
    with pytest.raises(ValueError, match=r"call model\.hf_model\.eval\(\)"):
        freeze(build("llama").train())


def test_unknown_family_names_the_row_to_write() -> None:
    model = build("llama")
    model.config.model_type = "unheard_of"
    with pytest.raises(pc.FamilyError, match=r"got 'unheard_of'.*pc\.register_family\(model_type='unheard_of'"):
        pc.ReplacementModel(model, transcoders())


def test_a_registered_row_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    model = build("phi3")
    model.config.model_type = "mine"
    row = pc.register_family(model_type="mine", value="self_attn.qkv_proj", fused="blocks")
    assert pc.ReplacementModel(model, transcoders()).family is row


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gemma2", {"gain_offset": 0.0}, "attention .* off"),
        ("gemma2", {"final_softcap": None}, "logits .* off"),
        ("gemma2", {"post_mlp_norm": None}, "order .* off"),
        ("gemma2", {"post_attention_norm": None}, "attention .* off|order .* off"),
        ("llama", {"parallel": True}, "mlp_input .* off"),
        ("llama", {"mlp_norm": None}, "mlp_input .* off|mlp_norm"),
        ("gpt2", {"norm": "rms"}, "attention .* off"),
        ("gpt_neox", {"fused": "blocks"}, "attention .* off"),
        ("phi3", {"fused": "none"}, "check `fused`"),
        ("gpt2", {"transposed": False}, "check `fused` and `transposed`"),
        ("gpt2", {"mlp_norm": "ln_3"}, r"got 'ln_3', which GPT2Block has not \(it has ln_1, attn, ln_2, mlp\)"),
        ("gpt2", {"position_embedding": None}, "None"),
    ],
)
def test_a_wrong_row_raises(name: str, fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    model = build(name)
    pc.register_family(replace(FAMILIES[name], **fields))
    if "position_embedding" in fields:  # not an error: positions then count as part of the tokens
        pc.ReplacementModel(model, transcoders())
        return
    with pytest.raises(pc.FamilyError, match=message):
        pc.ReplacementModel(model, transcoders())


def test_register_family_checks_its_fields() -> None:
    with pytest.raises(TypeError, match="got layer_norm"):
        pc.register_family(model_type="x", layer_norm="y")
    with pytest.raises(TypeError, match="no model_type"):
        pc.register_family(norm="rms")
    with pytest.raises(ValueError, match="norm must be one of rms, layer, got 'batch'"):
        pc.register_family(model_type="x", norm="batch")
    with pytest.raises(ValueError, match="model_type must be"):
        pc.register_family(model_type="")


def test_masks_that_are_not_causal_raise() -> None:
    assert sliding_window(torch.ones(5, 5, dtype=torch.bool).tril()) == 0
    assert sliding_window(torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)) == 2
    chunked = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool().tril()
    for mask in (torch.ones(5, 5, dtype=torch.bool), chunked):
        with pytest.raises(pc.FamilyError, match="must be causal"):
            sliding_window(mask)


def test_vocabulary_of_the_table() -> None:
    """Prompts of these tests stay inside the vocabulary, so that a failure is never an id out of range."""
    assert int(prompt(64).max()) < VOCABULARY
