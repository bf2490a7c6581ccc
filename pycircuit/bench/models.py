"""A language model with transcoders at a standard shape, random weights, everything from one seed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import pycircuit as pc

from .shapes import Shape

VOCABULARY, MLP_FACTOR = 8192, 4


def language_model(shape: Shape, seed: int = 0, device: str = "cpu") -> Any:
    """A transformers Llama, made on its device: embeddings N(0, 1), every other matrix N(0, 0.25 / width)."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=MLP_FACTOR * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        max_position_embeddings=max(4096, shape.positions),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config)
    g = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 if "embed" in name else 0.5 / math.sqrt(shape.width), generator=g)
    return model.eval()


def transcoder_weights(shape: Shape, seed: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Weights of transcoders, lists with one entry a layer; theta: [features] leaves `active` features a position.

    w_dec[l]: [features, width], or [features, layers - l, width] across layers, in the shape's type of decoders.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=g, device=device, dtype=dtype).mul_(scale)

    layers, features, width = range(shape.layers), shape.features, shape.width
    decoder_scale, dtype = (width * shape.active) ** -0.5, getattr(torch, shape.decoders)
    slots = [(shape.layers - layer,) if shape.cross_layer else () for layer in layers]
    threshold = -math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * shape.active / features - 1)))
    return {
        "w_enc": [normal(features, width, scale=width**-0.5) for _ in layers],
        "w_dec": [normal(features, *slots[layer], width, scale=decoder_scale, dtype=dtype) for layer in layers],
        "b_enc": [normal(features, scale=0.01) for _ in layers],
        "b_dec": [normal(width, scale=0.01) for _ in layers],
        "theta": torch.full((features,), threshold, device=device),
    }


def replacement(shape: Shape, device: str = "cpu") -> pc.ReplacementModel:
    """The model and its transcoders on a device; both kinds read after the MLP's norm, where L0 holds."""
    w = transcoder_weights(shape, device=device)
    kind = pc.CrossLayerTranscoder if shape.cross_layer else pc.PerLayerTranscoders
    transcoders = kind(w["w_enc"], w["b_enc"], w["w_dec"], w["b_dec"], pc.JumpReLU(w["theta"]), reads="mlp_in")
    return pc.ReplacementModel(language_model(shape, device=device), transcoders)


def prompt(positions: int, seed: int = 2) -> Tensor:
    """Token 0, then random others: [positions]."""
    ids = torch.randint(1, VOCABULARY, (positions,), generator=torch.Generator().manual_seed(seed))
    ids[0] = 0
    return ids
