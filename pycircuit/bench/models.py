"""A language model with transcoders at a standard shape, random weights, everything from one seed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import pycircuit as pc

from .shapes import Shape

VOCABULARY, MLP_FACTOR = 8192, 4


def language_model(shape: Shape, seed: int = 0) -> Any:
    """A transformers Llama: embeddings N(0, 1), every other matrix N(0, 0.25 / width)."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.width, intermediate_size=MLP_FACTOR * shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width, max_position_embeddings=max(4096, shape.positions), rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 if "embed" in name else 0.5 / math.sqrt(shape.width), generator=g)
    return model.eval()


def transcoder_weights(shape: Shape, seed: int = 1) -> dict[str, Any]:
    """Per-layer weights, lists with one entry a layer; theta: [features] leaves `active` features a position."""
    g = torch.Generator().manual_seed(seed)

    def each(*size: int, scale: float) -> list[Tensor]:
        return [torch.randn(*size, generator=g).mul_(scale) for _ in range(shape.layers)]

    threshold = -math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * shape.active / shape.features - 1)))
    return {
        "w_enc": each(shape.features, shape.width, scale=shape.width**-0.5),
        "w_dec": each(shape.features, shape.width, scale=(shape.width * shape.active) ** -0.5),
        "b_enc": each(shape.features, scale=0.01),
        "b_dec": each(shape.width, scale=0.01),
        "theta": torch.full((shape.features,), threshold),
    }


def replacement(shape: Shape) -> pc.ReplacementModel:
    w = transcoder_weights(shape)
    rule = pc.JumpReLU(w["theta"])
    return pc.ReplacementModel(
        language_model(shape), pc.PerLayerTranscoders(w["w_enc"], w["b_enc"], w["w_dec"], w["b_dec"], rule)
    )


def prompt(positions: int, seed: int = 2) -> Tensor:
    """Token 0, then random others: [positions]."""
    ids = torch.randint(1, VOCABULARY, (positions,), generator=torch.Generator().manual_seed(seed))
    ids[0] = 0
    return ids
