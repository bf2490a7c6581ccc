"""Traces on the pretended device: every family and kind, every plan, equal to the CPU's."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import builders
import pytest
import torch
from builders import SOME, transcoders

import pycircuit as pc
from pycircuit.trace.memory_plan import Bound, Fixed, Plan, decide

PROMPT = builders.prompt(9)


@lru_cache(maxsize=2)
def language_model(family: str, device: str) -> Any:
    return builders.build(family).to(device)


def model(family: str, kind: str, device: str) -> pc.ReplacementModel:
    return pc.ReplacementModel(language_model(family, device), transcoders(kind, torch.float32).to(device))


def compare(graph: pc.Graph, truth: pc.Graph) -> None:
    """Rows of the same features, the same edges, the law."""
    assert graph.certificate < 1e-5
    assert torch.equal(graph.features, truth.features) and torch.equal(graph.row_node, truth.row_node)
    edges, expected = (g.dense()[g.row_node] for g in (graph, truth))
    assert float(((edges - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-5


@pytest.mark.parametrize(("family", "kind"), SOME)
def test_family_and_kind(family: str, kind: str) -> None:
    options: dict[str, Any] = {"max_targets": 3, "max_features": 12, "progress": False}
    truth = pc.attribute(model(family, kind, "cpu"), PROMPT, **options)
    there = pc.attribute(model(family, kind, "cuda"), PROMPT, **options)
    assert pc.last_run().implementation == "triton"
    compare(there, truth)


@pytest.mark.parametrize("stored", [True, False], ids=["patterns stored", "patterns recomputed"])
@pytest.mark.parametrize("rows", [(True, None), (False, None), (False, 16)], ids=["dense", "packed", "cut"])
def test_plan(rows: tuple[bool, int | None], stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows ranked where the plan keeps them."""
    plans = []

    def decided(model: Any, work: Any, bound: Bound, fixed: Fixed | None = None) -> Plan:
        plans.append(decide(model, work, bound, Fixed(stored, rows)))
        return plans[-1]

    monkeypatch.setattr(import_module("pycircuit.trace.attribute"), "decide", decided)
    options: dict[str, Any] = {"max_targets": 3, "max_features": 20, "round_size": 8, "progress": False}
    truth = pc.attribute(model("gemma2", "plt", "cpu"), PROMPT, **options)
    there = pc.attribute(model("gemma2", "plt", "cuda"), PROMPT, **options)
    assert {(p.dense, p.keep, p.stored) for p in plans} == {(*rows, stored)}
    compare(there, truth)
