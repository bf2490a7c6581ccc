"""Every generation of circuit-tracer: stand-ins that offer its interface alone, over the installed package's models."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import Any

import circuit_tracer
import pair
import pytest
import torch
from circuit_tracer.graph import Graph

from pycircuit.integrations.circuit_tracer import accelerate, attribute

SIZE, KIND = pair.Size(layers=2), pair.Kind(rule="topk", skip=True)
SETTINGS = {"batch_size": 8, "update_interval": 2, "max_feature_nodes": 20}
# What the package's models offer besides what upstream's do: one set of names for both backends.
UNIFIED = (
    "unembed_proj", "model_config", "run_forward_pass", "get_offload_targets_phase0", "get_offload_targets_phase1",
    "get_offload_targets_phase2", "_transcoders_as_list",
)  # fmt: skip


class NamedGraph(Graph):
    """The graph of the generations that say `scan_name`."""

    def __init__(
        self,
        input_string: str,
        input_tokens: Any,
        active_features: Any,
        adjacency_matrix: Any,
        cfg: Any,
        selected_features: Any,
        activation_values: Any,
        logit_targets: Any,
        logit_probabilities: Any,
        scan_name: Any = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(
            input_string, input_tokens, active_features, adjacency_matrix, cfg, selected_features, activation_values,
            logit_targets, logit_probabilities, None, vocab_size,
        )  # fmt: skip
        del self.scan
        self.scan_name = scan_name


@dataclass(frozen=True)
class Interface:
    """Names that a generation has not, and what it has in place of them."""

    scan: str
    hidden: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


BY_BACKEND = ("attribute_transformerlens", "attribute_nnsight")
INTERFACES = {
    "upstream v0.5.0": Interface("scan", UNIFIED, BY_BACKEND),
    "upstream July": Interface("scan_name", (*UNIFIED, "scan"), BY_BACKEND),
    "fork 0.6.0": Interface("scan_name", ("scan",)),
}
EVERY = pytest.mark.parametrize("name", INTERFACES)
BACKENDS = pytest.mark.parametrize("backend", ["transformerlens", "nnsight"])


class View:
    """A replacement model with the names of one generation and no others."""

    def __init__(self, model: Any, interface: Interface) -> None:
        self.__dict__.update(_model=model, _hidden=interface.hidden)
        self.__dict__[interface.scan] = "transcoders of a test"

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(f"no attribute {name!r}")
        return getattr(self._model, name)


def model(backend: str) -> Any:
    weights = pair.transcoder_weights(KIND, SIZE, torch.float32, 6)
    transcoders = pair.circuit_tracer_transcoders(KIND, weights, SIZE, torch.float32)
    language = pair.language_model("llama", SIZE, torch.float32)
    if backend == "nnsight":
        return pair.nnsight_of(language, transcoders, SIZE)
    return pair.lens_of("llama", language, transcoders, SIZE, torch.float32)


def ids() -> torch.Tensor:
    return pair.prompt(9, SIZE.vocabulary)


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("circuit-tracer's own function must not run")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Interface]:
    """Give the installed package the modules and the graph of a generation."""

    def give(name: str) -> Interface:
        interface = INTERFACES[name]
        if interface.scan == "scan_name":
            monkeypatch.setattr(sys.modules["circuit_tracer.graph"], "Graph", NamedGraph)
        for word in interface.modules:
            full = f"circuit_tracer.attribution.{word}"
            module = types.ModuleType(full)
            module.__spec__ = ModuleSpec(full, None)
            module.attribute = types.FunctionType(never.__code__, globals(), word)  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, full, module)
        return interface

    return give


@EVERY
@BACKENDS
@pytest.mark.parametrize("offload", [None, "disk"])
def test_a_generation_is_served(name: str, backend: str, offload: Any, install: Callable[[str], Interface]) -> None:
    own = model(backend)
    wanted = attribute(ids(), own, **SETTINGS)
    interface = install(name)
    graph = attribute(ids(), View(own, interface), **SETTINGS, offload=offload)
    assert torch.equal(graph.adjacency_matrix, wanted.adjacency_matrix) and len(graph.selected_features) == 20
    assert torch.equal(graph.active_features, wanted.active_features) and graph.cfg == wanted.cfg
    assert getattr(graph, interface.scan) == "transcoders of a test"
    assert {p.device.type for p in getattr(own, "_module", own).parameters()} == {"cpu"}


@pytest.mark.parametrize("name", [name for name, interface in INTERFACES.items() if interface.modules])
def test_accelerate_replaces_the_functions_of_each_backend(name: str, install: Callable[[str], Interface]) -> None:
    interface = install(name)
    modules = [sys.modules[f"circuit_tracer.attribution.{word}"] for word in interface.modules]
    before = [module.attribute for module in modules]
    with accelerate():
        for module, backend in zip(modules, ("transformerlens", "nnsight"), strict=True):
            graph = module.attribute(ids(), View(model(backend), interface), **SETTINGS)
            assert len(graph.selected_features) == 20
    assert [module.attribute for module in modules] == before


class StrangeGraph(Graph):
    """The graph of a generation that is not known."""

    def __init__(self, input_string: str, adjacency_matrix: Any, scan_label: Any = None) -> None:
        raise AssertionError("never made")


def test_an_unknown_generation_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    lens, own = model("transformerlens"), circuit_tracer.attribute
    monkeypatch.setattr(sys.modules["circuit_tracer.graph"], "Graph", StrangeGraph)
    known = r"circuit-tracer must be .*v0\.5\.0.*July.*0\.6\.0.*, got 0\.5"
    for word, call in (("accelerate", accelerate), ("attribute", lambda: attribute(ids(), lens))):
        with pytest.raises(ImportError, match=f"^{word}: {known}"):
            call()
    assert circuit_tracer.attribute is own


def test_an_argument_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown argument of `attribute` itself would be a TypeError in a user's call."""

    def newer(prompt: Any, model: Any, *, rounds: int = 4) -> None: ...

    module = sys.modules["circuit_tracer.attribution.attribute"]
    monkeypatch.setattr(module, "attribute", newer)
    with pytest.raises(ImportError, match="attribute takes rounds"):
        accelerate()
    assert module.attribute is newer and "rounds" in inspect.signature(newer).parameters


@BACKENDS
def test_a_model_without_a_name_is_refused_before_it_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model(backend)
    monkeypatch.setattr(type(own), "ensure_tokenized", never)
    for name in ("cfg", "zero_positions", {"transformerlens": "blocks", "nnsight": "embed_weight"}[backend]):
        with pytest.raises(TypeError, match=rf"^attribute: model must offer .*{name}"):
            attribute(ids(), View(own, Interface("scan", (name,))))
