"""From a model and a prompt to an attribution graph."""

from .attribute import attribute, trace_frozen
from .checkpoint import CheckpointError
from .estimate import Estimate, estimate
from .many import attribute_many
from .memory_plan import MemoryBoundError
from .targets import Feature

__all__ = [
    "CheckpointError",
    "Estimate",
    "Feature",
    "MemoryBoundError",
    "attribute",
    "attribute_many",
    "estimate",
    "trace_frozen",
]
