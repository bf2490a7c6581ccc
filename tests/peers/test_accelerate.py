"""Tests of `accelerate`: every name of circuit-tracer's functions is replaced and restored."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import circuit_tracer
import pytest
import torch
from circuit_tracer import attribute as circuit_tracer_attribute
from drop_in_cases import SETTINGS, ids, plain

from pycircuit.integrations import circuit_tracer as drop_in
from pycircuit.integrations.circuit_tracer import (
    accelerate,
    attribute,
)

# accelerate()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module that imported the function by name, twice."""
    module = types.ModuleType("a_users_script")
    exec("from circuit_tracer import attribute\nfrom circuit_tracer import attribute as run", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module


def test_accelerate_replaces_every_name_and_gives_it_back(script: types.ModuleType) -> None:
    theirs = sys.modules["circuit_tracer.attribution.attribute"]
    with accelerate():
        ours = circuit_tracer.attribute
        assert ours is theirs.attribute is script.attribute is script.run is not circuit_tracer_attribute_of(script)
        assert globals()["circuit_tracer_attribute"] is ours  # this module's name, too
        graph = script.run(ids(), plain("lens llama"), **SETTINGS)
        exec("from circuit_tracer import attribute as late", script.__dict__)
    assert circuit_tracer.attribute is theirs.attribute is script.attribute is script.run is script.late
    assert script.attribute is circuit_tracer_attribute and theirs.attribute.__module__ == theirs.__name__
    assert torch.equal(graph.adjacency_matrix, attribute(ids(), plain("lens llama"), **SETTINGS).adjacency_matrix)


def circuit_tracer_attribute_of(script: types.ModuleType) -> Any:
    """circuit-tracer's own, whatever names are bound to."""
    return script.attribute.__wrapped__


def test_accelerate_nests_repeats_and_ends_with_an_error(script: types.ModuleType) -> None:
    own = script.attribute
    first, second = accelerate(), accelerate()
    assert script.attribute is not own and script.attribute.__wrapped__ is own
    first.restore()
    first.restore()  # a second call does nothing
    assert script.attribute is not own
    second.restore()
    assert script.attribute is own is circuit_tracer.attribute
    with pytest.raises(KeyError), accelerate(), accelerate():
        raise KeyError
    assert script.attribute is own is circuit_tracer.attribute


def test_accelerate_leaves_our_own_name_alone(script: types.ModuleType) -> None:
    mine = drop_in.attribute
    with accelerate():
        script.mine = mine
    assert script.mine is mine is drop_in.attribute is not script.attribute


class Lazy(types.ModuleType):
    """As some packages have them: a look at what it holds imports all of it."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise ImportError("everything at once")


def test_accelerate_wakes_no_lazy_module(script: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_lazy_module", Lazy("a_lazy_module"))
    monkeypatch.setitem(sys.modules, "none", None)  # as an import that is forbidden
    own = script.attribute
    with accelerate():
        assert script.attribute is not own
    assert script.attribute is own


def test_one_handle_serves_nested_blocks_and_no_later_one(script: types.ModuleType) -> None:
    own, handle = script.attribute, accelerate()
    with handle:
        with handle:
            pass
        assert script.attribute is not own
    assert script.attribute is own
    with pytest.raises(RuntimeError, match=r"entered before restore\(\), .*call it again"), handle:
        pass
    assert script.attribute is own
