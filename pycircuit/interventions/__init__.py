"""Changing what a model computes and seeing what follows: interventions, steered generation, validation of graphs."""

from .changed_graph import attribute_changed
from .generate import generate
from .group_effects import GroupEffects
from .intervene import Intervened, intervene, intervene_many
from .intervention import FREEZE, Intervention
from .validate import validate

__all__ = [
    "FREEZE",
    "GroupEffects",
    "Intervened",
    "Intervention",
    "attribute_changed",
    "generate",
    "intervene",
    "intervene_many",
    "validate",
]
