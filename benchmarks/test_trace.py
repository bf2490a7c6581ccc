"""Whole traces on plain PyTorch ops and on the native ones. Run it with `make bench`."""

from __future__ import annotations

import pytest

from pycircuit.bench import whole_trace
from pycircuit.bench.session import Session
from pycircuit.bench.shapes import SHAPES


@pytest.mark.parametrize("shape", ["small", "medium"])
def test_native_against_reference(shape: str, session: Session, traces: list[whole_trace.Traced]) -> None:
    compared = whole_trace.compare(SHAPES[shape])
    session.rate(compared[0].threads)
    traces += compared
