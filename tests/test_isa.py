"""Code compiled for one ISA must not be shared with another: no weak symbols, every ISA tested where it runs."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

import pytest

from pycircuit import _native
from pycircuit.ops.dispatch import native_isas

ISAS = [name for name, _ in native_isas()]


@cache
def _symbols() -> tuple[tuple[str, str], ...]:
    """(kind, demangled name) of every symbol in the built module."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("nm is not installed (binutils)")
    found = subprocess.run([tool, "-C", _native.__file__], check=True, capture_output=True, text=True)
    lines = [line[17:] for line in found.stdout.splitlines()]  # after the address
    symbols = tuple((line[0], line[2:]) for line in lines if len(line) > 2)
    if not symbols:
        pytest.skip("the module was stripped of its symbols, as an installed wheel is")
    return symbols


@pytest.mark.parametrize("isa", ISAS)
def test_no_weak_symbols(isa: str) -> None:
    ours = [(kind, name) for kind, name in _symbols() if f"isa_{isa}::" in name]
    assert len(ours) >= 6  # five ops and encode_free at least: the names are what we think
    assert [s for s in ours if s[0] in "WwVvu"] == []


def test_no_library_template_in_isa_files() -> None:
    """Weak symbols belong to module.cpp (pybind11, std); none may mention our kernels' types."""
    weak = [name for kind, name in _symbols() if kind in "WwVvu"]
    assert [name for name in weak if "pycircuit::isa_" in name] == []


def test_isas_are_ordered_and_the_baseline_runs() -> None:
    assert ISAS[0] == "baseline" and dict(native_isas())["baseline"]
    supported = [flag for _, flag in native_isas()]
    assert supported == sorted(supported, reverse=True)  # a machine with v4 has v3
