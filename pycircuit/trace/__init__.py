"""From a model and a prompt to an attribution graph."""

from .attribute import attribute, trace_frozen
from .targets import Feature

__all__ = ["Feature", "attribute", "trace_frozen"]
