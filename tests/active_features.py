"""Active features of a prompt, spread over layers and positions, for tests of interventions."""

from __future__ import annotations

from torch import Tensor

import pycircuit as pc


def active_features(
    model: pc.ReplacementModel, prompt: Tensor, count: int, first_layer: int = 0
) -> list[tuple[int, int, int, float]]:
    """About `count` active features of a prompt: (layer, position, feature, value)."""
    entries = [
        (layer, position, feature, value)
        for layer, f in enumerate(model.activations(prompt))
        if layer >= first_layer
        for position, feature, value in zip(f.position().tolist(), f.index.tolist(), f.value.tolist(), strict=True)
    ]
    return entries[:: max(1, len(entries) // count)][:count]
