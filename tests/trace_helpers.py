"""Helpers for tests of traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pycircuit as pc
from pycircuit.trace.estimate import sample_prompt
from pycircuit.trace.memory_model import TraceSize
from pycircuit.trace.sweep import Sweep
from pycircuit.trace.trace_options import MaxFeatures, TraceOptions


def same_graph(a: pc.Graph, b: pc.Graph) -> bool:
    """Compare two graphs bit for bit, timings aside."""
    tensors = ("features", "values", "row_node", "bias", "dropped", "preactivation")
    pairs = [(getattr(a, name), getattr(b, name)) for name in tensors]
    pairs += [(getattr(a.rows, name), getattr(b.rows, name)) for name in ("row_ptr", "column", "weight")]
    return all(torch.equal(x, y) for x, y in pairs)


def in_small_tiles(monkeypatch: pytest.MonkeyPatch, targets: int = 3) -> None:
    monkeypatch.setattr(Sweep, "fitting", lambda self, layer, *_: min(targets, len(layer)))


def expected_size(model: pc.ReplacementModel, ids: Any, max_features: MaxFeatures, max_targets: int = 10) -> TraceSize:
    """Return the size of a trace, extrapolated from the prompt's first positions."""
    options = TraceOptions.checked("estimate", model, None, max_features, -1, 0.95, max_targets, "float32", None)
    return sample_prompt(model, torch.as_tensor(ids), options).size(model, options)
