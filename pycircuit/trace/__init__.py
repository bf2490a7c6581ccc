"""From a model and a prompt to an attribution graph."""

from .attribute import attribute
from .targets import Feature

__all__ = ["Feature", "attribute"]
