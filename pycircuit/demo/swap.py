"""The experiment that proves a circuit: take one concept's features out, put another's in, and see what is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .facts import TWO_HOP

if TYPE_CHECKING:
    from pycircuit.causal import Intervention
    from pycircuit.model import ReplacementModel


def active(model: ReplacementModel, prompt: str, concept: str) -> list[tuple[int, int, int, float]]:
    """(layer, position, feature, value) of the active features that are named after the concept."""
    (found,) = model.activations([prompt])
    out = []
    for layer, features in enumerate(found):
        entries = zip(features.position().tolist(), features.index.tolist(), features.value.tolist(), strict=True)
        out += [(layer, p, f, value) for p, f, value in entries if model.labels.get((layer, f)) == concept]
    return out


def swap(model: ReplacementModel, prompt: str, concept: str, source: str, other: str) -> list[Intervention]:
    """Interventions on `prompt`: features of `concept` off, those of `other` as they are on the prompt `source`.

    The two prompts are the same sentence about two cities, so that places correspond.
    """
    from pycircuit.causal import Intervention

    off = {(layer, p, f): 0.0 for layer, p, f, _ in active(model, prompt, concept)}
    on = {(layer, p, f): value for layer, p, f, value in active(model, source, other)}
    return [Intervention(*where, value=value) for where, value in (off | on).items()]


def two_hop(city: str) -> str:
    return TWO_HOP.format(city)
