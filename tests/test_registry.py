"""Every op has every form under one name, with one argument order, cases, a benchmark and its sources."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch
from skip_reasons import unexplained

import pycircuit as pc
from pycircuit.ops import arguments, cases, reference
from pycircuit.ops.registry import IMPLEMENTATIONS, OPS

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
    in_parts = {"triton": ("attend_back", "edge_scores"), "native": ("attend_back",)}  # of the sweep's precision
    with_parts = op in in_parts.get(form, ())
    assert _parameters(function) == (*OPS[op].parameters, *["parts"] * with_parts)


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
    assert op in {row.op for row in import_module("pycircuit.bench.catalog").ROWS}


def test_no_case_or_check_without_an_op() -> None:
    assert set(cases.CASES) == set(arguments.CHECKS) == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_reference_is_short(op: str) -> None:
    body = ast.parse(inspect.getsource(getattr(reference, op))).body[0].body  # type: ignore[attr-defined]
    assert body[-1].end_lineno - body[0].lineno + 1 <= LONGEST_REFERENCE


def test_a_skip_needs_a_reason_that_is_known_and_true() -> None:
    true_reason = "a CUDA device is here" if torch.cuda.is_available() else "needs a CUDA device"
    untrue_reason = "needs a CUDA device" if torch.cuda.is_available() else "a CUDA device is here"
    assert unexplained([("a", true_reason)]) == []
    assert unexplained([("a", true_reason), ("b", untrue_reason), ("c", "not yet")]) == [
        f"b: {untrue_reason}",
        "c: not yet",
    ]
