"""Traces on the pretended device: every family and kind, every plan, equal to the CPU's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import builders
import pytest
from builders import FAMILY_SAMPLE
from gpu_models import compare, replacement_model

import pycircuit as pc
from pycircuit.trace.memory_plan import Bound, Fixed, MemoryPlan, plan_memory

PROMPT = builders.prompt(9)


@pytest.mark.parametrize(("family", "kind"), FAMILY_SAMPLE)
def test_family_and_kind(family: str, kind: str) -> None:
    options: dict[str, Any] = {"max_targets": 3, "max_features": 12, "progress": False}
    truth = pc.attribute(replacement_model(family, kind, "cpu"), PROMPT, **options)
    graph = pc.attribute(replacement_model(family, kind, "cuda"), PROMPT, **options)
    assert pc.last_run().implementation == "triton"
    compare(graph, truth)


@pytest.mark.parametrize("stored", [True, False], ids=["patterns stored", "patterns recomputed"])
@pytest.mark.parametrize("rows", [(True, None), (False, None), (False, 16)], ids=["dense", "packed", "cut"])
def test_plan(rows: tuple[bool, int | None], stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows ranked where the plan keeps them."""
    plans = []

    def planned(model: Any, trace: Any, bound: Bound, fixed: Fixed | None = None) -> MemoryPlan:
        plans.append(plan_memory(model, trace, bound, Fixed(stored, rows)))
        return plans[-1]

    monkeypatch.setattr(import_module("pycircuit.trace.attribute"), "plan_memory", planned)
    options: dict[str, Any] = {"max_targets": 3, "max_features": 20, "round_size": 8, "progress": False}
    truth = pc.attribute(replacement_model("gemma2", "plt", "cpu"), PROMPT, **options)
    graph = pc.attribute(replacement_model("gemma2", "plt", "cuda"), PROMPT, **options)
    assert {(p.dense, p.keep, p.stored) for p in plans} == {(*rows, stored)}
    compare(graph, truth)
