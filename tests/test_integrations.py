"""pycircuit inside other tools, where the tool is not installed. What needs it is in tests/peers."""

from __future__ import annotations

import sys

import pytest

from pycircuit.integrations import circuit_tracer
from pycircuit.integrations.circuit_tracer import attribution


def test_circuit_tracer_is_imported_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(name.split(".")[0] in ("circuit_tracer", "transformer_lens", "nnsight") for name in sys.modules)
    monkeypatch.setattr(attribution, "find_spec", lambda _: None)
    for call in (lambda: circuit_tracer.attribute([0, 1], None), circuit_tracer.accelerate):
        with pytest.raises(ImportError, match="pip install circuit-tracer"):
            call()
