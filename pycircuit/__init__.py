"""pycircuit: a fast engine for attribution graphs of language models."""

from importlib.metadata import version as _version

from . import ops
from .ops import BatchTopK, Features, ImplementationError, JumpReLU, ReLU, TopK, explain, last_run, use

__version__ = _version("pycircuit")
__all__ = [
    "BatchTopK",
    "Features",
    "ImplementationError",
    "JumpReLU",
    "ReLU",
    "TopK",
    "explain",
    "last_run",
    "ops",
    "use",
]
