"""A transformers model as plain tensors: its family, its frozen forward on one prompt, its replacement by features."""

from .families import Family, FamilyError, register_family
from .frozen import FrozenLayer, FrozenModel, FrozenNorm
from .replacement import LocalReplacement, ReplacementModel

__all__ = [
    "Family",
    "FamilyError",
    "FrozenLayer",
    "FrozenModel",
    "FrozenNorm",
    "LocalReplacement",
    "ReplacementModel",
    "register_family",
]
