"""Pairs of models with equal weights: pycircuit's and circuit-tracer's replacement models."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from circuit_tracer import attribute as circuit_tracer_attribute
from circuit_tracer.graph import Graph as CircuitTracerGraph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.transcoder.activation_functions import JumpReLU as CircuitTracerJumpReLU
from circuit_tracer.transcoder.activation_functions import TopK as CircuitTracerTopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder as CircuitTracerCrossLayer
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions

import pycircuit as pc
from pycircuit.model.replacement import LocalReplacement
from pycircuit.trace import trace_frozen

# ours -> (where circuit-tracer hooks in); what transcoders read and write under either name.
READS = {"resid_mid": "hook_resid_mid", "mlp_normed": "ln2.hook_normalized", "mlp_in": "mlp.hook_in"}
WRITES = {"mlp_out": "hook_mlp_out", "mlp_raw": "mlp.hook_out"}


@dataclass(frozen=True)
class Size:
    layers: int = 3
    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 8
    mlp: int = 48
    vocabulary: int = 61
    features: int = 24
    longest: int = 64


@dataclass(frozen=True)
class Kind:
    """Transcoders: per layer or cross-layer, their rule, and where they read and write."""

    cross: bool = False
    rule: str = "jumprelu"
    skip: bool = False
    reads: str = "mlp_in"
    writes: str = "mlp_out"


class Tokenizer:
    """Tokenizer without files for circuit-tracer: token 0 opens a prompt, a token's text is its number."""

    bos_token_id = pad_token_id = eos_token_id = 0
    padding_side = "right"

    def __init__(self, vocabulary: int) -> None:
        self.all_special_ids, self.vocab_size = [0], vocabulary

    def decode(self, ids: Any) -> str:
        return " ".join(str(int(i)) for i in torch.as_tensor(ids).flatten())

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]


def _shape(size: Size) -> dict[str, int]:
    """Fields that every config has under these names."""
    return {
        "vocab_size": size.vocabulary, "hidden_size": size.width, "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_width, "max_position_embeddings": size.longest,
    }  # fmt: skip


def _llama(size: Size) -> Any:
    return transformers.LlamaConfig(**_shape(size), rms_norm_eps=1e-5, tie_word_embeddings=False)


def _gemma2(size: Size) -> Any:
    return transformers.Gemma2Config(
        **_shape(size), rms_norm_eps=1e-6,
        query_pre_attn_scalar=size.head_width, attn_logit_softcapping=1.5, final_logit_softcapping=2.0,
        sliding_window=4, layer_types=_windows(size.layers, "sliding_attention", "full_attention"),
    )  # fmt: skip


def _gemma3(size: Size) -> Any:
    return transformers.Gemma3TextConfig(
        **_shape(size), rms_norm_eps=1e-6,
        query_pre_attn_scalar=size.head_width, sliding_window=4,
        layer_types=_windows(size.layers, "sliding_attention", "full_attention"),
    )  # fmt: skip


def _gemma3_vision(size: Size) -> Any:
    """Gemma 3's text model beside a vision tower, as in the models of 4B and more."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 16, "patch_size": 8}  # fmt: skip
    text = _gemma3(size).to_dict()
    return transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=1)


def _qwen3(size: Size) -> Any:
    return transformers.Qwen3Config(**_shape(size), rms_norm_eps=1e-6)


def _gpt_oss(size: Size) -> Any:
    return transformers.GptOssConfig(
        **_shape(size), num_local_experts=4, num_experts_per_tok=2,
        sliding_window=4, layer_types=_windows(size.layers, "sliding_attention", "full_attention"),
    )  # fmt: skip


def _gpt2(size: Size) -> Any:
    return transformers.GPT2Config(
        vocab_size=size.vocabulary, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
        n_positions=size.longest, n_inner=size.mlp,
    )  # fmt: skip


def _windows(layers: int, even: str, odd: str) -> list[str]:
    return [odd if layer % 2 else even for layer in range(layers)]


def _lens_config(family: str, size: Size, dtype: torch.dtype) -> HookedTransformerConfig:
    rotary = {
        "positional_embedding_type": "rotary", "rotary_dim": size.head_width, "normalization_type": "RMS",
        "gated_mlp": True, "final_rms": True, "n_key_value_heads": size.kv_heads,
    }  # fmt: skip
    own = {
        "llama": {**rotary, "act_fn": "silu", "eps": 1e-5},
        "gemma2": {
            **rotary, "act_fn": "gelu_pytorch_tanh", "eps": 1e-6, "attn_scores_soft_cap": 1.5,
            "output_logits_soft_cap": 2.0, "use_normalization_before_and_after": True, "use_local_attn": True,
            "window_size": 4, "attn_types": _windows(size.layers, "local", "global"),
        },
        "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN", "positional_embedding_type": "standard"},
    }[family]  # fmt: skip
    return HookedTransformerConfig(
        n_layers=size.layers, d_model=size.width, n_ctx=size.longest, d_head=size.head_width, n_heads=size.heads,
        d_mlp=size.mlp, d_vocab=size.vocabulary, device="cpu", dtype=dtype, model_name="tiny", init_weights=False,
        default_prepend_bos=False, tokenizer_name=None, **own,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[Size], Any]] = {"llama": _llama, "gemma2": _gemma2, "gpt2": _gpt2}
# Not in TransformerLens here.
ALONE = {"gemma3": _gemma3, "gemma3_vision": _gemma3_vision, "qwen3": _qwen3, "gpt_oss": _gpt_oss}
CONVERT = {
    "llama": weight_conversions.convert_llama_weights,
    "gemma2": weight_conversions.convert_gemma_weights,
    "gpt2": weight_conversions.convert_gpt2_weights,
}


def language_model(family: str, size: Size, dtype: torch.dtype, seed: int = 0) -> Any:
    """A transformers model: no bias is zero, no norm's gain is one."""
    model = transformers.AutoModelForCausalLM.from_config(
        {**CONFIGS, **ALONE}[family](size), attn_implementation="eager"
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            if parameter.ndim > 1:
                embedding = any(marker in name for marker in ("wte", "wpe", "embed"))
                parameter.copy_(noise if embedding else 1.5 * noise / size.width**0.5)
            else:
                gain = float(name.endswith("weight") and not family.startswith("gemma"))
                parameter.copy_(gain + 0.4 * noise)
    return model.to(dtype).eval()


def transcoder_weights(kind: Kind, size: Size, dtype: torch.dtype, active: int, seed: int = 1) -> dict[str, Any]:
    """w_enc, b_enc, w_dec, b_dec, w_skip (lists, one entry a layer) as pycircuit takes them, and theta or k."""
    g = torch.Generator().manual_seed(seed)

    def random_tensors(*shape: int, scale: float = 1.0) -> list[Tensor]:
        return [(scale * torch.randn(*shape, generator=g)).to(dtype) for _ in range(size.layers)]

    written = 1 / math.sqrt(size.width * active)
    w_enc = random_tensors(size.features, size.width, scale=size.width**-0.5)
    w_dec = random_tensors(size.features, size.width)
    if kind.cross:
        w_dec = [torch.randn(size.features, size.layers - n, size.width, generator=g) for n in range(size.layers)]
    threshold = -math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * active / size.features - 1)))
    return {
        "w_enc": w_enc,
        "w_dec": [(w * written).to(dtype) for w in w_dec],
        "b_enc": random_tensors(size.features, scale=0.1),
        "b_dec": random_tensors(size.width, scale=0.1),
        "w_skip": random_tensors(size.width, size.width, scale=size.width**-0.5),
        "theta": torch.full((size.features,), threshold, dtype=dtype),
        "k": active,
    }


def our_transcoders(kind: Kind, w: dict[str, Any]) -> Any:
    of = pc.CrossLayerTranscoder if kind.cross else pc.PerLayerTranscoders
    rules = {"jumprelu": pc.JumpReLU(w["theta"]), "topk": pc.TopK(w["k"], keep_negative=True), "relu": pc.ReLU()}
    skip = w["w_skip"] if kind.skip else None
    return of(w["w_enc"], w["b_enc"], w["w_dec"], w["b_dec"], rules[kind.rule], skip, kind.reads, kind.writes)


def _set(module: torch.nn.Module, **values: Tensor) -> None:
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(value)


def circuit_tracer_transcoders(kind: Kind, w: dict[str, Any], size: Size, dtype: torch.dtype) -> Any:
    where = {"feature_input_hook": READS[kind.reads], "feature_output_hook": WRITES[kind.writes]}
    if kind.cross:
        rule = {"jumprelu": "jump_relu", "relu": "relu"}[kind.rule]
        clt = CircuitTracerCrossLayer(
            size.layers, size.features, size.width, rule, kind.skip, False, dtype=dtype, **where
        )
        _set(clt, W_enc=torch.stack(w["w_enc"]), b_enc=torch.stack(w["b_enc"]), b_dec=torch.stack(w["b_dec"]))
        for layer, decoder in enumerate(w["w_dec"]):
            clt.W_dec[layer].data.copy_(decoder)
        if kind.rule == "jumprelu":
            clt.activation_function.threshold.data.copy_(w["theta"])
        if kind.skip:
            _set(clt, W_skip=torch.stack(w["w_skip"]))
        return clt
    by_layer = {}
    for layer in range(size.layers):
        rules = {
            "jumprelu": lambda: CircuitTracerJumpReLU(w["theta"].clone(), 0.1),
            "topk": lambda: CircuitTracerTopK(w["k"]),
        }
        transcoder = SingleLayerTranscoder(size.width, size.features, rules[kind.rule](), layer, kind.skip, dtype=dtype)
        _set(transcoder, **{name: w[name.lower()][layer] for name in ("W_enc", "b_enc", "W_dec", "b_dec")})
        if kind.skip:
            _set(transcoder, W_skip=w["w_skip"][layer].T)  # circuit-tracer's per-layer skip multiplies by the transpose
        by_layer[layer] = transcoder
    return TranscoderSet(by_layer, **where)


def our_model(family: str, kind: Kind, size: Size, dtype: torch.dtype, active: int) -> pc.ReplacementModel:
    transcoders = our_transcoders(kind, transcoder_weights(kind, size, dtype, active))
    return pc.ReplacementModel(language_model(family, size, dtype), transcoders, Tokenizer(size.vocabulary))


def circuit_tracer_model(family: str, kind: Kind, size: Size, dtype: torch.dtype, active: int) -> Any:
    weights = transcoder_weights(kind, size, dtype, active)
    return circuit_tracer_of(family, language_model(family, size, dtype), kind, weights, size, dtype)


def lazy_transcoders(transcoders: Any, folder: Path, encoder: bool, decoder: bool) -> Any:
    """Save circuit-tracer's transcoders and load them again, with encoders or decoders left in their files."""
    transcoders.to_safetensors(str(folder))
    where = {name: getattr(transcoders, name) for name in ("feature_input_hook", "feature_output_hook")}
    options = {"dtype": transcoders.b_dec.dtype if hasattr(transcoders, "b_dec") else transcoders[0].dtype}
    options |= {"lazy_encoder": encoder, "lazy_decoder": decoder, "scan": "tiny"}
    if isinstance(transcoders, CircuitTracerCrossLayer):
        return load_clt(str(folder), **where, **options)
    return load_transcoder_set(
        {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(len(transcoders))}, **where, **options
    )


def nnsight_of(model: Any, transcoders: Any, size: Size) -> Any:
    """circuit-tracer's replacement model around a transformers model, by its other backend."""
    from circuit_tracer.replacement_model.replacement_model_nnsight import NNSightReplacementModel

    model.config.architectures = [type(model).__name__]
    out = NNSightReplacementModel(model, tokenizer=Tokenizer(size.vocabulary), dispatch=True)
    out._hf_config = model.config
    out._configure_replacement_model(transcoders)
    return out


def circuit_tracer_of(
    family: str, model: Any, kind: Kind, weights: dict[str, Any], size: Size, dtype: torch.dtype
) -> Any:
    """circuit-tracer's replacement model with the weights of a transformers model and of our transcoders."""
    return lens_of(family, model, circuit_tracer_transcoders(kind, weights, size, dtype), size, dtype)


def lens_of(family: str, model: Any, transcoders: Any, size: Size, dtype: torch.dtype, fold: bool = False) -> Any:
    """TransformerLens replacement model with circuit-tracer's transcoders.

    fold: fold gains and biases of norms into the weights they feed.
    """
    config = _lens_config(family, size, dtype)
    out = TransformerLensReplacementModel(config)
    with torch.no_grad():
        state = CONVERT[family](model, config)
    as_they_are = {"fold_ln": fold, "center_writing_weights": False, "center_unembed": False}
    out.load_and_process_state_dict(state, **as_they_are, fold_value_biases=False)
    out._configure_replacement_model(transcoders)
    out.tokenizer = Tokenizer(size.vocabulary)
    return out


def prompt(positions: int, vocabulary: int, seed: int = 2) -> Tensor:
    """Token 0, then random others: [positions]."""
    ids = torch.randint(1, vocabulary, (positions,), generator=torch.Generator().manual_seed(seed))
    ids[0] = 0
    return ids


def without_first_errors(local: LocalReplacement) -> LocalReplacement:
    """Errors at the ignored positions gone, as circuit-tracer drops them; our own keep them, so that the law holds."""
    errors = local.errors.clone()
    errors[:, : local.ignore_positions] = 0
    return replace(local, errors=errors)


def trace_ours(model: Any, ids: Tensor, **options: Any) -> pc.Graph:
    """A graph with circuit-tracer's error columns."""
    return trace_frozen(model, without_first_errors(model.freeze(ids)), **options)


def trace_circuit_tracer(model: Any, ids: Tensor, **options: Any) -> CircuitTracerGraph:
    """In the model's own type: circuit-tracer's edge matrix takes torch's default. Its hooks make torch warn."""
    return by(circuit_tracer_attribute, model, ids, **options)


def by(attribute: Callable[..., CircuitTracerGraph], model: Any, ids: Any, **options: Any) -> CircuitTracerGraph:
    """Trace by any function with the signature of circuit-tracer's `attribute`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.unembed_proj.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            return attribute(ids, model, **options)
    finally:
        torch.set_default_dtype(before)


def selected(graph: pc.Graph) -> pc.Graph:
    """The graph of the expanded features alone, as circuit-tracer keeps it."""
    mask = torch.ones(graph.nodes, dtype=torch.bool)
    mask[: graph.first_error] = False
    mask[graph.row_node] = True
    return graph.subgraph(mask)
