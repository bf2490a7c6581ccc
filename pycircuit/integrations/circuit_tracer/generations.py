"""The generations of circuit-tracer that are served, told apart by their interface, and their names for things.

A version says too little: 0.5.0 of the package registry is a fork, and upstream's tag v0.5.0 calls itself 0.4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """One interface of circuit-tracer.

    name: as its users know it. modules: those with an `attribute` of one backend. scan: what its graphs and models
    call the name of their transcoders.
    """

    name: str
    modules: tuple[str, ...]
    scan: str


BY_BACKEND = ("attribution.attribute_transformerlens", "attribution.attribute_nnsight")
# The first whose interface is all there is the one that is installed.
GENERATIONS = (
    Generation("upstream's v0.5.0", BY_BACKEND, "scan"),
    Generation("upstream's state of July 2026", BY_BACKEND, "scan_name"),
    Generation("the package registry's 0.5.0", (), "scan"),
    Generation("the fork's 0.6.0 and its head", (), "scan_name"),
)
# Arguments with which the drop-in calls what it uses.
_CALLS = {
    ("attribution.targets", "AttributionTargets"): (
        "attribution_targets", "logits", "unembed_proj", "tokenizer", "max_n_logits", "desired_logit_prob",
    ),
    ("transcoder.activation_functions", "JumpReLU"): ("threshold", "bandwidth"),
    ("transcoder.activation_functions", "TopK"): ("k",),
    ("utils.disk_offload", "offload_modules"): ("modules", "offload_type"),
}  # fmt: skip
_GRAPH = (
    "input_string", "input_tokens", "logit_targets", "logit_probabilities", "vocab_size", "active_features",
    "activation_values", "selected_features", "adjacency_matrix", "cfg",
)  # fmt: skip
_ATTRIBUTE = (
    "prompt", "model", "attribution_targets", "max_n_logits", "desired_logit_prob", "batch_size", "max_feature_nodes",
    "offload", "verbose", "update_interval",
)  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """Dotted names that every generation's models of one backend have. layers: modules with an `mlp` each."""

    unembedding: str
    layers: str
    others: tuple[str, ...]


_SHARED = ("cfg", "tokenizer", "transcoders", "zero_positions", "ensure_tokenized")
BACKENDS = {
    "transformerlens": Backend(
        "unembed.W_U", "blocks",
        (*_SHARED, "W_E", "unembed.b_U", "ln_final", "hook_dict", "feature_input_hook", "original_feature_output_hook"),
    ),
    "nnsight": Backend("unembed_weight", "pre_logit_location.layers", (*_SHARED, "_module", "embed_weight")),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """A replacement model of any generation: what the drop-in reads of it beside its weights."""

    model: Any
    generation: Generation
    backend: Backend

    @property
    def unembedding(self) -> Tensor:
        return _named(self.model, self.backend.unembedding)

    @property
    def scan(self) -> dict[str, Any]:
        """The name of its transcoders, as the argument of a graph."""
        return {self.generation.scan: getattr(self.model, self.generation.scan)}

    @property
    def mlps(self) -> list[Any]:
        """Modules that the sweep does not need."""
        return [layer.mlp for layer in _named(self.model, self.backend.layers)]


def library(name: str) -> Any:
    """circuit-tracer, or one of its modules by its name within it."""
    if find_spec("circuit_tracer") is None:
        raise ImportError("circuit-tracer must be installed for its drop-in: pip install circuit-tracer")
    return import_module(f"circuit_tracer.{name}" if name else "circuit_tracer")


def has_module(name: str) -> bool:
    library("")
    return find_spec(f"circuit_tracer.{name}") is not None


def generation(operation: str) -> Generation:
    """The generation that is installed; an error of the operation's, by name, where it is none of these."""
    library("")
    missing = {row: _missing(row) for row in GENERATIONS}
    present = [row for row in GENERATIONS if not missing[row]]
    if not present:
        known = ", ".join(row.name for row in GENERATIONS)
        nearest = min(missing.values(), key=len)
        raise ImportError(
            f"{operation}: circuit-tracer must be of a generation that pycircuit knows ({known}), got {_version()}, "
            f"whose {'; '.join(nearest)}; install one of these, or trace with pc.attribute"
        )
    return present[0]


def source(model: Any) -> Source:
    """A replacement model, once everything that will be asked of it is there."""
    row = generation("attribute")
    name = getattr(model, "backend", None)
    if name not in BACKENDS:
        raise TypeError(
            "attribute: model must be a circuit_tracer.ReplacementModel with the transformerlens or the nnsight "
            f"backend, got {type(model).__name__}; pc.attribute takes a pc.ReplacementModel"
        )
    backend = BACKENDS[name]
    needed = (backend.unembedding, backend.layers, *backend.others, row.scan)
    missing = [name for name in needed if not _has(model, name)]
    if missing:
        raise TypeError(
            f"attribute: model must offer {', '.join(missing)} as the {name} models of {row.name} do, got "
            f"{type(model).__name__} of circuit-tracer {_version()} without; trace with pc.attribute"
        )
    return Source(model, row, backend)


def _named(owner: Any, name: str) -> Any:
    return reduce(getattr, name.split("."), owner)


def _has(owner: Any, name: str) -> bool:
    for word in name.split("."):
        if not hasattr(owner, word):
            return False
        owner = getattr(owner, word)
    return True


def _missing(row: Generation) -> list[str]:
    """Ways in which the installed interface is not this one."""
    wrong = [f"module {name} is not there" for name in row.modules if not has_module(name)]
    for (module, name), arguments in {**_CALLS, ("graph", "Graph"): (*_GRAPH, row.scan)}.items():
        if not has_module(module) or not _takes(getattr(library(module), name, None), arguments):
            wrong.append(f"{module}.{name} does not take {', '.join(arguments)}")
    for module in ("attribution.attribute", *row.modules):
        if has_module(module):
            extra = signature(library(module).attribute).parameters.keys() - set(_ATTRIBUTE)
            wrong += [f"{module}.attribute takes {', '.join(sorted(extra))}"] if extra else []
    return wrong


def _takes(function: Callable[..., Any] | None, arguments: tuple[str, ...]) -> bool:
    if function is None:
        return False
    try:
        signature(function).bind(**dict.fromkeys(arguments))
    except TypeError:
        return False
    return True


def _version() -> str:
    try:
        return version("circuit-tracer")
    except PackageNotFoundError:
        return "of no version"
