"""The third witness: doubling a source in the real model moves every target by its edge.

The real model is transformers' own forward with patterns and denominators frozen (tests/frozen_hf.py).
"""

from __future__ import annotations

import builders
import pytest
import torch
from builders import KINDS, replacement
from deviation import worst_deviation

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", builders.CONFIGS)
def test_doubling_a_source_moves_every_target_by_its_edge(family: str, kind: str) -> None:
    """Every feature, error and token against every feature and output, in float64, to 1e-10 of a row's norm."""
    model = replacement(family, kind, torch.float64)
    graph = pc.attribute(model, builders.prompt(9), position=[-1, 4], max_targets=3)
    assert graph.rows.count == len(graph.features) + len(graph.targets) > 20
    preactivation_error, edge_error = worst_deviation(graph, model, list(range(graph.first_target)))
    assert preactivation_error < 1e-10 and edge_error < 1e-10
