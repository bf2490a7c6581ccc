"""Every op has every form under one name, with one argument order, cases, a benchmark and its sources."""

from __future__ import annotations

import ast
import inspect
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import pycircuit as pc
from pycircuit.ops import arguments, cases, reference
from pycircuit.ops.dispatch import native_isas
from pycircuit.ops.registry import IMPLEMENTATIONS, OPS

# What a test may be skipped for: something the machine lacks or has, never something we have not done.
REASONS = {
    "needs a CUDA device": lambda: not torch.cuda.is_available(),
    "a CUDA device is here": torch.cuda.is_available,
    "triton is not installed": lambda: find_spec("triton") is None,
    "this machine runs every ISA": lambda: all(supported for _, supported in native_isas()),
    "needs Linux": lambda: not Path("/proc/self/clear_refs").exists(),
    "nm is not installed": lambda: shutil.which("nm") is None,
    "no object files under build/": lambda: not (ROOT / "build").exists(),
}
ROOT = Path(__file__).parents[1]
LONGEST_REFERENCE = 15  # lines of a body


def _parameters(function: object) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_five_ops() -> None:
    assert tuple(OPS) == ("encode", "decode", "attend_back", "edge_scores", "influence")
    assert all(op.name == name and op.summary for name, op in OPS.items())


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", OPS)
def test_form(op: str, form: str) -> None:
    if form == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    function = OPS[op].form(form)
    assert function.__name__ == op
    assert _parameters(function) == OPS[op].parameters


@pytest.mark.parametrize("op", OPS)
def test_public_function_and_checks(op: str) -> None:
    assert op in pc.ops.__all__
    for function in (getattr(pc.ops, op), arguments.CHECKS[op]):
        assert _parameters(function) == OPS[op].parameters
    defaults = [inspect.signature(f).parameters for f in (getattr(pc.ops, op), arguments.CHECKS[op])]
    assert [p.default for p in defaults[0].values()] == [p.default for p in defaults[1].values()]
    assert inspect.getdoc(getattr(pc.ops, op))


@pytest.mark.parametrize("op", OPS)
def test_sources(op: str) -> None:
    assert (ROOT / "csrc" / "cpu" / f"{op}.cpp").is_file()
    assert (ROOT / "kernels" / f"{op}.py").is_file()


@pytest.mark.parametrize("op", OPS)
def test_cases(op: str) -> None:
    names = set(cases.CASES[op])
    assert {"empty", "one", "misaligned", *(f"tail_{n}" for n in cases.TAILS)} <= names
    assert len(cases.CASES[op]["one"](cases.generator())) == len(OPS[op].parameters)


@pytest.mark.parametrize("op", OPS)
def test_benchmark(op: str) -> None:
    assert op in {row.op for row in import_module("pycircuit.bench.rows").ROWS}


def test_no_case_or_check_without_an_op() -> None:
    assert set(cases.CASES) == set(arguments.CHECKS) == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_reference_is_short(op: str) -> None:
    body = ast.parse(inspect.getsource(getattr(reference, op))).body[0].body  # type: ignore[attr-defined]
    assert body[-1].end_lineno - body[0].lineno + 1 <= LONGEST_REFERENCE


def test_skips_have_known_reasons(skipped: list[tuple[str, str]]) -> None:
    """Last of all: every skip so far was for a reason above, and the reason is true of this machine."""
    for test, reason in skipped:
        known = [holds for start, holds in REASONS.items() if reason.startswith(start)]
        assert known and known[0](), f"{test}: {reason}"
    counts = {start: sum(reason.startswith(start) for _, reason in skipped) for start in REASONS}
    assert sum(counts.values()) == len(skipped)
    print(f"{len(skipped)} skipped:", {start: n for start, n in counts.items() if n})
