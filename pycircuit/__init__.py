"""pycircuit: a fast engine for attribution graphs of language models."""

from importlib.metadata import version as _version

from . import graph, ops
from .graph import Graph
from .ops import BatchTopK, Features, ImplementationError, JumpReLU, ReLU, TopK, explain, last_run, use

__version__ = _version("pycircuit")
__all__ = [
    "BatchTopK",
    "Features",
    "Graph",
    "ImplementationError",
    "JumpReLU",
    "ReLU",
    "TopK",
    "explain",
    "graph",
    "last_run",
    "ops",
    "use",
]
