"""Code compiled for one ISA must not be shared with another: no weak symbols, every ISA tested where it runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pycircuit.ops.dispatch import native_isas
from pycircuit.ops.registry import OPS

ISAS = [name for name, _ in native_isas()]
BUILD = Path(__file__).parents[1] / "build"
WEAK = "WwVvu"
# A pointer to the C++ runtime, wherever a destructor may run while an error passes: data, the same in every ISA.
SHARED_DATA = [("V", "DW.ref.__gxx_personality_v0")]


def _objects(isa: str) -> list[Path]:
    """The objects of one ISA, of the newest build that has them."""
    folders = sorted(BUILD.glob(f"**/cpu_{isa}.dir/csrc/cpu"), key=lambda f: f.stat().st_mtime)
    return sorted(folders[-1].glob("*.o")) if folders else []


def _symbols(path: Path) -> list[tuple[str, str]]:
    """(kind, demangled name) of every symbol of an object file."""
    listing = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True)
    return [(line[17], line[19:]) for line in listing.stdout.splitlines() if len(line) > 19]


@pytest.mark.parametrize("isa", ISAS)
def test_no_weak_symbols(isa: str) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed (binutils)")
    objects = _objects(isa)
    if not objects:
        pytest.skip("no object files under build/: the package was installed, not built here")
    assert {f"{op}.cpp.o" for op in OPS} <= {o.name for o in objects}
    for path in objects:
        symbols = _symbols(path)
        assert symbols and [s for s in symbols if s[0] in WEAK and s not in SHARED_DATA] == [], path.name
        defined = [name for kind, name in symbols if kind in "TDBR" and "pycircuit" in name]
        assert all(f"isa_{isa}::" in name or name.endswith(f"op_table_{isa}") for name in defined), path.name


def test_isas_are_ordered_and_the_baseline_runs() -> None:
    assert ISAS[0] == "baseline" and dict(native_isas())["baseline"]
    supported = [flag for _, flag in native_isas()]
    assert supported == sorted(supported, reverse=True)  # a machine with v4 has v3
