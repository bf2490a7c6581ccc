"""Whole traces on plain PyTorch ops and on the native ones. Run it with `make bench`."""

from __future__ import annotations

import pytest

from pycircuit.bench import trace
from pycircuit.bench.session import Session
from pycircuit.bench.shapes import SHAPES


@pytest.mark.parametrize("shape", ["small", "medium"])
def test_native_against_reference(shape: str, session: Session, traces: list[trace.Traced]) -> None:
    found = trace.compare(SHAPES[shape])
    session.rate(found[0].threads)
    traces += found
