"""Supported generations of circuit-tracer, distinguished by their interface, and the names that each uses.

Version numbers do not distinguish them: 0.5.0 of the package registry is a fork, and upstream's tag v0.5.0 has
version 0.4.1.
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

    name: for users. modules: those with an `attribute` of one backend. scan: the attribute of its graphs and models
    with the name of their transcoders.
    """

    name: str
    modules: tuple[str, ...]
    scan: str


BY_BACKEND = ("attribution.attribute_transformerlens", "attribution.attribute_nnsight")
# The first whose complete interface is present is the installed one.
GENERATIONS = (
    Generation("upstream's v0.5.0", BY_BACKEND, "scan"),
    Generation("upstream's state of July 2026", BY_BACKEND, "scan_name"),
    Generation("the package registry's 0.5.0", (), "scan"),
    Generation("the fork's 0.6.0 and its head", (), "scan_name"),
)
# Arguments with which the drop-in calls functions and classes of circuit-tracer.
_REQUIRED_ARGUMENTS = {
    ("attribution.targets", "AttributionTargets"): (
        "attribution_targets", "logits", "unembed_proj", "tokenizer", "max_n_logits", "desired_logit_prob",
    ),
    ("transcoder.activation_functions", "JumpReLU"): ("threshold", "bandwidth"),
    ("transcoder.activation_functions", "TopK"): ("k",),
    ("utils.disk_offload", "offload_modules"): ("modules", "offload_type"),
}  # fmt: skip
_GRAPH_ARGUMENTS = (
    "input_string", "input_tokens", "logit_targets", "logit_probabilities", "vocab_size", "active_features",
    "activation_values", "selected_features", "adjacency_matrix", "cfg",
)  # fmt: skip
_ATTRIBUTE_ARGUMENTS = (
    "prompt", "model", "attribution_targets", "max_n_logits", "desired_logit_prob", "batch_size", "max_feature_nodes",
    "offload", "verbose", "update_interval",
)  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """Dotted names that models of one backend have in every generation. layers: modules with an `mlp` each."""

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
    """A replacement model of any generation, and the fields that the drop-in reads beside its weights."""

    model: Any
    generation: Generation
    backend: Backend

    @property
    def unembedding(self) -> Tensor:
        return _resolve(self.model, self.backend.unembedding)

    @property
    def scan(self) -> dict[str, Any]:
        """The name of its transcoders, as the argument of a graph."""
        return {self.generation.scan: getattr(self.model, self.generation.scan)}

    @property
    def mlps(self) -> list[Any]:
        """Modules that the sweep does not need."""
        return [layer.mlp for layer in _resolve(self.model, self.backend.layers)]


def library(name: str) -> Any:
    """circuit-tracer, or one of its modules by its name within it."""
    if find_spec("circuit_tracer") is None:
        raise ImportError("circuit-tracer must be installed for its drop-in: pip install circuit-tracer")
    return import_module(f"circuit_tracer.{name}" if name else "circuit_tracer")


def has_module(name: str) -> bool:
    library("")
    return find_spec(f"circuit_tracer.{name}") is not None


def generation(operation: str) -> Generation:
    """The installed generation; ImportError, with the operation's name, if it is none of the supported ones."""
    library("")
    missing = {candidate: _missing(candidate) for candidate in GENERATIONS}
    present = [candidate for candidate in GENERATIONS if not missing[candidate]]
    if not present:
        known = ", ".join(candidate.name for candidate in GENERATIONS)
        nearest = min(missing.values(), key=len)
        raise ImportError(
            f"{operation}: circuit-tracer must be of a generation that pycircuit knows ({known}), got {_version()}, "
            f"whose {'; '.join(nearest)}; install one of these, or trace with pc.attribute"
        )
    return present[0]


def source(model: Any) -> Source:
    """Wrap a replacement model, once it is known to have everything that the drop-in reads."""
    installed = generation("attribute")
    name = getattr(model, "backend", None)
    if name not in BACKENDS:
        raise TypeError(
            "attribute: model must be a circuit_tracer.ReplacementModel with the transformerlens or the nnsight "
            f"backend, got {type(model).__name__}; pc.attribute takes a pc.ReplacementModel"
        )
    backend = BACKENDS[name]
    needed = (backend.unembedding, backend.layers, *backend.others, installed.scan)
    missing = [name for name in needed if not _resolves(model, name)]
    if missing:
        raise TypeError(
            f"attribute: model must offer {', '.join(missing)} as the {name} models of {installed.name} do, got "
            f"{type(model).__name__} of circuit-tracer {_version()} without; trace with pc.attribute"
        )
    return Source(model, installed, backend)


def _resolve(owner: Any, name: str) -> Any:
    return reduce(getattr, name.split("."), owner)


def _resolves(owner: Any, name: str) -> bool:
    for word in name.split("."):
        if not hasattr(owner, word):
            return False
        owner = getattr(owner, word)
    return True


def _missing(generation: Generation) -> list[str]:
    """Differences of the installed interface from this generation's."""
    differences = [f"module {name} is not there" for name in generation.modules if not has_module(name)]
    required = {**_REQUIRED_ARGUMENTS, ("graph", "Graph"): (*_GRAPH_ARGUMENTS, generation.scan)}
    for (module, name), arguments in required.items():
        if not has_module(module) or not _accepts(getattr(library(module), name, None), arguments):
            differences.append(f"{module}.{name} does not take {', '.join(arguments)}")
    for module in ("attribution.attribute", *generation.modules):
        if has_module(module):
            unknown = signature(library(module).attribute).parameters.keys() - set(_ATTRIBUTE_ARGUMENTS)
            differences += [f"{module}.attribute takes {', '.join(sorted(unknown))}"] if unknown else []
    return differences


def _accepts(function: Callable[..., Any] | None, arguments: tuple[str, ...]) -> bool:
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
