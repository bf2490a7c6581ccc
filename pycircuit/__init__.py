"""pycircuit: a fast engine for attribution graphs of language models."""

import os as _os
from importlib.metadata import version as _version

from . import command_interrupt as _command_interrupt  # noqa: F401 - first: it acts on Ctrl-C during the imports below
from . import graph, ops
from .examples import write_examples
from .graph import Faithfulness, Graph, Path, Pruned, Scores
from .interventions import Intervened, Intervention, generate, intervene, intervene_many, validate
from .load import load
from .model import Family, FamilyError, ReplacementModel, register_family
from .ops import BatchTopK, ImplementationError, JumpReLU, ReLU, SparseFeatures, TopK, explain, last_run, use
from .trace import CheckpointError, Estimate, Feature, MemoryBoundError, attribute, attribute_many, estimate
from .training import Evaluation, Recipe, evaluate, train
from .transcoders import CrossLayerTranscoder, PerLayerTranscoders, Transcoders
from .transcoders.formats import register_format

__version__ = _version("pycircuit")
# An editable install also searches the repository, where kernels/ lies: `pycircuit.tests` would import.
__path__ = [folder for folder in __path__ if folder != _os.path.dirname(_os.path.dirname(__file__))]
__all__ = [
    "BatchTopK",
    "CheckpointError",
    "CrossLayerTranscoder",
    "Estimate",
    "Evaluation",
    "Faithfulness",
    "Family",
    "FamilyError",
    "Feature",
    "Graph",
    "ImplementationError",
    "Intervened",
    "Intervention",
    "JumpReLU",
    "MemoryBoundError",
    "Path",
    "PerLayerTranscoders",
    "Pruned",
    "ReLU",
    "Recipe",
    "ReplacementModel",
    "Scores",
    "SparseFeatures",
    "TopK",
    "Transcoders",
    "attribute",
    "attribute_many",
    "estimate",
    "evaluate",
    "explain",
    "generate",
    "graph",
    "intervene",
    "intervene_many",
    "last_run",
    "load",
    "ops",
    "register_family",
    "register_format",
    "train",
    "use",
    "validate",
    "write_examples",
]


def __dir__() -> list[str]:
    return sorted(__all__)
