"""Swap of two concepts' features, the experiment that tests a circuit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .facts import TWO_HOP

if TYPE_CHECKING:
    from pycircuit.interventions import Intervention
    from pycircuit.model import ReplacementModel


def active(model: ReplacementModel, prompt: str, concept: str) -> dict[tuple[int, int, int], float]:
    """Activation by (layer, position, feature) of the active features that are named after the concept."""
    (layers,) = model.activations([prompt])
    out = {}
    for layer, features in enumerate(layers):
        for position, feature, value in zip(features.position(), features.index, features.value, strict=True):
            if model.labels.get((layer, int(feature))) == concept:
                out[layer, int(position), int(feature)] = float(value)
    return out


def swap(model: ReplacementModel, prompt: str, concept: str, source: str, other: str) -> list[Intervention]:
    """Interventions on `prompt`: features of `concept` off, those of `other` on.

    Features of `other` get their activation on the prompt `source`, the same sentence about another city, so that
    positions correspond.
    """
    from pycircuit.interventions import Intervention

    off = dict.fromkeys(active(model, prompt, concept), 0.0)
    changes = off | active(model, source, other)
    return [Intervention(*feature, value=value) for feature, value in changes.items()]


def two_hop(city: str) -> str:
    """The prompt that asks for the capital of the state containing a city."""
    return TWO_HOP.format(city)
