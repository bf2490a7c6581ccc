"""A half-precision forward, added up again in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .frozen import FrozenModel, FrozenNorm
from .weights import ModelWeights, Norm


def sum_in_float32(
    frozen: FrozenModel, weights: ModelWeights, mlp_raw: Tensor, record: Sequence[str]
) -> tuple[FrozenModel, dict[str, Tensor]]:
    """Add up a half-precision run again in float32 from its embeddings, patterns and MLP outputs.

    Half precision rounds the stream at every layer, so what is added to it does not add up to it: edges would miss
    the law by the rounding of a whole stream. These streams do add up; norms are frozen on them.
    """
    streams = {name: torch.empty_like(mlp_raw) for name in record if name != "mlp_raw"}
    stream = frozen.first_stream()
    layers = []
    for i, (layer, layer_weights) in enumerate(zip(frozen.layers, weights.layers, strict=True)):
        layer = replace(layer, attention_norm=_frozen_on(layer_weights.attention_norm, stream))
        raw = layer.attention_raw(stream)
        layer = replace(layer, post_attention_norm=_frozen_on(layer_weights.post_attention_norm, raw))
        attended = raw if layer.post_attention_norm is None else layer.post_attention_norm.forward(raw)
        middle = stream if layer.parallel else stream + attended
        layer = replace(layer, mlp_norm=_frozen_on(layer_weights.mlp_norm, middle))
        layer = replace(layer, post_mlp_norm=_frozen_on(layer_weights.post_mlp_norm, mlp_raw[i]))
        added = layer.mlp_added(mlp_raw[i])
        values = {"resid_in": stream, "attention_out": attended, "resid_mid": middle, "mlp_out": added}
        for name in ("mlp_normed", "mlp_in"):
            norm = layer.read_norm(name)
            values[name] = middle if norm is None else norm.forward(middle)
        for name, out in streams.items():
            out[i] = values[name]
        stream = stream + attended + added
        layers.append(layer)
    if "mlp_raw" in record:
        streams["mlp_raw"] = mlp_raw
    final_norm = weights.final_norm.freeze(stream)
    return replace(frozen, layers=tuple(layers), final_stream=stream, final_norm=final_norm), streams


def _frozen_on(norm: Norm | None, x: Tensor) -> FrozenNorm | None:
    return None if norm is None else norm.freeze(x)
