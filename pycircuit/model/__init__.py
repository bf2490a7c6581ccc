"""From a transformers model to plain tensors: families, capture, frozen model, replacement."""

from .families import Family, FamilyError, register_family
from .frozen import FrozenLayer, FrozenModel, FrozenNorm
from .replacement import LocalReplacement, ReplacementModel

__all__ = [
    "Family", "FamilyError", "FrozenLayer", "FrozenModel", "FrozenNorm", "LocalReplacement", "ReplacementModel",
    "register_family",
]  # fmt: skip
