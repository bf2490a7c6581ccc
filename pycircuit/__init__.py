"""pycircuit: a fast engine for attribution graphs of language models.

Every public name is imported at its first use: `import pycircuit` itself takes milliseconds, and a graph can be read
without what traces or trains.
"""

from __future__ import annotations

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import command_interrupt as _command_interrupt  # noqa: F401 - first: it acts on Ctrl-C during later imports

if _TYPE_CHECKING:
    from . import graph, ops
    from .examples import write_examples
    from .graph import Comparison, Faithfulness, Graph, Path, Picture, Pruned, Scores, Stability, Supernode, compare
    from .interventions import (
        GroupEffects,
        Intervened,
        Intervention,
        attribute_changed,
        generate,
        intervene,
        intervene_many,
        validate,
    )
    from .labels import label
    from .loading import load
    from .model import Family, FamilyError, ReplacementModel, register_family
    from .ops import BatchTopK, ImplementationError, JumpReLU, ReLU, SparseFeatures, TopK, explain, last_run, use
    from .page.server import PageServer, serve
    from .trace import (
        CheckpointError,
        Contrast,
        Estimate,
        Feature,
        MemoryBoundError,
        attribute,
        attribute_many,
        estimate,
    )
    from .training import Evaluation, HeldOutPlan, Recipe, evaluate, from_checkpoint, train
    from .transcoders import CrossLayerTranscoder, PerLayerTranscoders, Transcoders
    from .transcoders.formats import register_format

    __version__: str

# An editable install also searches the repository, where kernels/ lies: `pycircuit.tests` would import.
__path__ = [folder for folder in __path__ if folder != _os.path.dirname(_os.path.dirname(__file__))]
__all__ = [
    "BatchTopK",
    "CheckpointError",
    "Comparison",
    "Contrast",
    "CrossLayerTranscoder",
    "Estimate",
    "Evaluation",
    "Faithfulness",
    "Family",
    "FamilyError",
    "Feature",
    "Graph",
    "GroupEffects",
    "HeldOutPlan",
    "ImplementationError",
    "Intervened",
    "Intervention",
    "JumpReLU",
    "MemoryBoundError",
    "PageServer",
    "Path",
    "PerLayerTranscoders",
    "Picture",
    "Pruned",
    "ReLU",
    "Recipe",
    "ReplacementModel",
    "Scores",
    "SparseFeatures",
    "Stability",
    "Supernode",
    "TopK",
    "Transcoders",
    "attribute",
    "attribute_changed",
    "attribute_many",
    "compare",
    "estimate",
    "evaluate",
    "explain",
    "from_checkpoint",
    "generate",
    "graph",
    "intervene",
    "intervene_many",
    "label",
    "last_run",
    "load",
    "ops",
    "register_family",
    "register_format",
    "serve",
    "train",
    "use",
    "validate",
    "write_examples",
]

# The module of each public name, as the imports above say it too.
_HOMES = {
    "examples": "write_examples",
    "graph": "Comparison Faithfulness Graph Path Picture Pruned Scores Stability Supernode compare",
    "interventions": (
        "GroupEffects Intervened Intervention attribute_changed generate intervene intervene_many validate"
    ),
    "labels": "label",
    "loading": "load",
    "model": "Family FamilyError ReplacementModel register_family",
    "ops": "BatchTopK ImplementationError JumpReLU ReLU SparseFeatures TopK explain last_run use",
    "page.server": "PageServer serve",
    "trace": "CheckpointError Contrast Estimate Feature MemoryBoundError attribute attribute_many estimate",
    "training": "Evaluation HeldOutPlan Recipe evaluate from_checkpoint train",
    "transcoders": "CrossLayerTranscoder PerLayerTranscoders Transcoders",
    "transcoders.formats": "register_format",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
_PACKAGES = ("graph", "interventions", "model", "ops", "page", "trace", "training", "transcoders")


def __getattr__(name: str) -> object:
    """Import a public name, or a package, at its first use."""
    if name == "__version__":
        value: object = _import_module("importlib.metadata").version(__name__)
    elif name in _PACKAGES:
        return _import_module(f"{__name__}.{name}")
    elif name in _HOME_OF:
        value = getattr(_import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
