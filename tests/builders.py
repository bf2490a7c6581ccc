"""Tiny random models of every family, with everything switched on that a family can have, and transcoders for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import pycircuit as pc

LAYERS, WIDTH, VOCABULARY, WINDOW = 3, 32, 61, 4

_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": False}
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
_GEMMA = {
    **_GROUPED, **_MIXED, "tie_word_embeddings": True, "head_dim": 12, "query_pre_attn_scalar": 9,
    "attention_bias": True,
}  # fmt: skip
_VISION = {
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "image_size": 16, "patch_size": 8},
    "mm_tokens_per_image": 1, "boi_token_index": 57, "eoi_token_index": 58, "image_token_index": 59,
}  # fmt: skip

# name -> (config class, its arguments). gpt_neox_sequential is gpt_neox with its parallel flag off.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
         "bos_token_id": 1, "eos_token_id": 2, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_SHAPE, "tie_word_embeddings": False}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**_SHAPE, "use_parallel_residual": False}),
    "llama": ("LlamaConfig", {**_GROUPED, "head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**_GROUPED, "head_dim": 12, "sliding_window": WINDOW}),
    "qwen2": (
        "Qwen2Config", {**_GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen3": (
        "Qwen3Config", {**_GROUPED, **_MIXED, "use_sliding_window": True, "head_dim": 12, "attention_bias": True}
    ),
    "gemma2": ("Gemma2Config", {**_GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3TextConfig", {**_GEMMA, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Config", {"text_config": {**_GEMMA, "final_logit_softcapping": 2.0}, **_VISION}),
    "olmo2": ("Olmo2Config", {**_GROUPED, "attention_bias": True}),
    "phi3": ("Phi3Config", {**_GROUPED, "sliding_window": WINDOW}),
    "gpt_oss": (
        "GptOssConfig", {**_GROUPED, **_MIXED, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
}  # fmt: skip
WINDOWED = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "phi3", "gpt_oss")


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode: no bias is zero, no norm's gain is one."""
    kind, arguments = CONFIGS[name]
    config = getattr(transformers, kind)(**{**arguments, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float64)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            if parameter.ndim > 1 and "bias" not in key:
                embedding = any(name in key for name in ("wte", "wpe", "embed"))
                parameter.copy_(noise if embedding else 1.5 * noise / WIDTH**0.5)
            else:
                gain = float("sinks" not in key and key.endswith("weight"))
                parameter.copy_(gain * ("gemma" not in name) + 0.4 * noise)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default, grouped products, has no float64
    return model.to(dtype).eval()


def prompt(positions: int = 13, seed: int = 1) -> torch.Tensor:
    """Token ids longer than any window here: [positions]."""
    return torch.randint(0, VOCABULARY, (positions,), generator=torch.Generator().manual_seed(seed))


# name -> (cross-layer, options): every way to read, to write and to activate, and a skip.
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plt": (False, {}),
    "plt_skip": (False, {"reads": "resid_mid", "skip": True}),
    "plt_raw_topk": (False, {"reads": "mlp_normed", "writes": "mlp_raw", "activation": pc.TopK(7)}),
    "plt_hole": (False, {"activation": pc.ReLU(), "hole": 1}),
    "clt": (True, {"reads": "resid_mid", "activation": pc.BatchTopK(0.8)}),
    "clt_skip": (True, {"skip": True}),
}


def transcoders(kind: str, dtype: torch.dtype, size: int = 24, seed: int = 0) -> Any:
    cross, options = KINDS[kind]
    layers, width, g = LAYERS, WIDTH, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def per_layer(*shape: int) -> list[Tensor | None]:
        return [None if n == options.get("hole") else normal(*shape) for n in range(layers)]

    activation = options.get("activation", pc.JumpReLU(torch.full((size,), 0.5, dtype=dtype)))
    where = {"activation": activation, "reads": options.get("reads", "mlp_in")}
    where["writes"] = options.get("writes", "mlp_out")
    w_enc, b_enc, b_dec = per_layer(size, width), per_layer(size), [normal(width) for _ in range(layers)]
    w_enc = [None if w is None else w / width**0.5 for w in w_enc]
    w_dec = [normal(size, layers - n, width) for n in range(layers)] if cross else per_layer(size, width)
    skip = per_layer(width, width) if options.get("skip") else None
    made = pc.CrossLayerTranscoder if cross else pc.PerLayerTranscoders
    return made(w_enc, b_enc, w_dec, b_dec, w_skip=skip, **where)


def replacement(family: str, kind: str, dtype: torch.dtype) -> pc.ReplacementModel:
    return pc.ReplacementModel(build(family, dtype), transcoders(kind, dtype))


EVERY = [(family, kind) for family in CONFIGS for kind in KINDS]

FAMILY_SAMPLE = [  # every kind with one family, and every other family with one kind
    (family, kind)
    for n, family in enumerate(CONFIGS)
    for k, kind in enumerate(KINDS)
    if family == "gemma2" or n % len(KINDS) == k
]
