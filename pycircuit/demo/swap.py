"""The experiment that proves a circuit: take one concept's features out, put another's in, and see what is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .facts import TWO_HOP

if TYPE_CHECKING:
    from pycircuit.interventions import Intervention
    from pycircuit.model import ReplacementModel


def active(model: ReplacementModel, prompt: str, concept: str) -> dict[tuple[int, int, int], float]:
    """Activation by (layer, position, feature) of the active features that are named after the concept."""
    (found,) = model.activations([prompt])
    out = {}
    for layer, features in enumerate(found):
        for position, feature, value in zip(features.position(), features.index, features.value, strict=True):
            if model.labels.get((layer, int(feature))) == concept:
                out[layer, int(position), int(feature)] = float(value)
    return out


def swap(
    model: ReplacementModel, prompt: str, concept: str, source: str, other: str, factor: float = 1.5
) -> list[Intervention]:
    """Interventions on `prompt`: features of `concept` off, those of `other` on.

    They get `factor` times what they are on the prompt `source`, the same sentence about another city, so that places
    correspond; errors go on saying a little of what the features no longer say, and have to be talked over.
    """
    from pycircuit.interventions import Intervention

    off = dict.fromkeys(active(model, prompt, concept), 0.0)
    on = {place: factor * value for place, value in active(model, source, other).items()}
    return [Intervention(*place, value=value) for place, value in (off | on).items()]


def two_hop(city: str) -> str:
    return TWO_HOP.format(city)
