"""Tests of integrations without their libraries; tests/peers has those with them."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import pytest
import torch

from pycircuit.integrations import circuit_tracer, sae_lens, sparsify
from pycircuit.integrations.circuit_tracer import generations
from pycircuit.integrations.handle import Accelerated


@pytest.mark.parametrize(("module", "package"), [(sae_lens, "sae-lens"), (sparsify, "eai-sparsify")])
def test_absent_libraries(monkeypatch: pytest.MonkeyPatch, module: Any, package: str) -> None:
    monkeypatch.setitem(sys.modules, module.__name__.rsplit(".", 1)[1], None)
    for function, arguments in ((module.accelerate, ()), (module.encode, (torch.zeros(2),))):
        with pytest.raises(ImportError, match=rf"{function.__name__}: {package} must be installed, .*; pip install"):
            function(torch.nn.Linear(2, 2), *arguments)


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def step(self) -> int:
        return self.value + 1


def test_methods_are_replaced_and_put_back() -> None:
    counter, calls = Counter(), []
    counter.value = 3
    with Accelerated(counter, {"step": lambda self: self.value + 10}, lambda: calls.append(1)) as handle:
        assert counter.step() == 13 and Counter().step() == 1
        with pytest.raises(ValueError, match=r"accelerate: Counter must have its own step, got one that was replaced"):
            Accelerated(counter, {"step": lambda self: 0})
    handle.undo()
    assert counter.step() == 4 and calls == [1]


def test_another_patch_is_not_taken_away() -> None:
    counter, calls = Counter(), []
    handle = Accelerated(counter, {"step": lambda self: 0}, lambda: calls.append(1))
    ours, counter.step = counter.step, lambda: 7
    with pytest.raises(ValueError, match=r"undo: Counter must still have the step it was given, got one"):
        handle.undo()
    assert counter.step() == 7 and not calls
    counter.step = ours
    handle.undo()
    assert counter.step() == 1 and calls == [1]


def test_a_pickled_object_runs_its_own_methods() -> None:
    def step(self: Counter) -> int:
        return 9

    counter = Counter()
    with Accelerated(counter, {"step": step}):
        again = pickle.loads(pickle.dumps(counter))
    assert again.step() == 1
    with Accelerated(again, {"step": lambda self: 5}):
        assert again.step() == 5
    assert again.step() == 1


def test_circuit_tracer_is_imported_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(name.split(".")[0] in ("circuit_tracer", "transformer_lens", "nnsight") for name in sys.modules)
    monkeypatch.setattr(generations, "find_spec", lambda _: None)
    for call in (lambda: circuit_tracer.attribute([0, 1], None), circuit_tracer.accelerate):
        with pytest.raises(ImportError, match="pip install circuit-tracer"):
            call()
