"""Whole traces through Triton's interpreter: the conservation law, and the reference's edges."""

from __future__ import annotations

import builders
import pytest
import torch
from builders import FAMILY_SAMPLE, replacement
from trace_helpers import assert_agrees_with_reference

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("family", "kind"), FAMILY_SAMPLE)
def test_law_on_triton(family: str, kind: str) -> None:
    """Triton's interpreter is slow, so the prompt has three tokens and few features have rows."""
    model = replacement(family, kind, torch.float32)
    with pc.use("triton"):
        graph = pc.attribute(model, builders.prompt(3), position=[-1, 1], max_targets=2, max_features=8)
        assert pc.last_run().implementation == "triton"
    assert graph.rows.count > 4 and graph.certificate < 1e-5


@pytest.mark.parametrize("kind", ["plt_skip", "clt"])
def test_triton_agrees_with_the_reference(kind: str) -> None:
    assert_agrees_with_reference("triton", kind)
