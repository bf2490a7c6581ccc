"""Which implementation runs: a pure choice, forced by name, per thread, and said afterwards."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import pycircuit as pc
from pycircuit.ops.dispatch import ENVIRONMENT, Machine, Request, choose, native_isas

X = (torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4), pc.ReLU())
FULL = Machine(native=None, isa="v3", triton=None, interpreter=False, cuda=None)
BARE = Machine(native="not built", isa=None, triton="not installed", interpreter=False, cuda="none")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def _request(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Request:
    return Request("encode", device, (dtype,))


@pytest.mark.parametrize(
    ("request_", "machine", "expected"),
    [
        (_request(), FULL, "native"),
        (_request(), BARE, "reference"),
        (_request("cuda"), FULL, "triton"),
        (_request("cuda"), BARE, "reference"),
        (_request("mps"), FULL, "reference"),
        (_request(dtype=torch.bfloat16), FULL, "native"),
        (_request(dtype=torch.float64), FULL, "reference"),
        (_request(dtype=torch.float16), FULL, "reference"),
    ],
)
def test_first_that_can(request_: Request, machine: Machine, expected: str) -> None:
    explanation = choose(request_, machine, None)
    assert explanation.implementation == expected
    assert explanation.isa == ("v3" if expected == "native" else None)
    assert [name for name, _ in explanation.reasons] == ["native", "triton", "reference"]


@pytest.mark.parametrize(
    ("forced", "request_", "machine", "why"),
    [
        ("native", _request(), BARE, "not built"),
        ("native", _request("cuda"), FULL, "tensors are on cuda"),
        ("native", _request(dtype=torch.float64), FULL, "not float64"),
        ("triton", _request(), FULL, "TRITON_INTERPRET"),
        ("triton", _request("cuda"), BARE, "not installed"),
    ],
)
def test_forced_and_cannot(forced: str, request_: Request, machine: Machine, why: str) -> None:
    with pytest.raises(pc.ImplementationError, match=rf"encode: {forced} was forced but cannot run: .*{why}"):
        choose(request_, machine, forced)


def test_triton_on_the_cpu_only_when_forced() -> None:
    interpreted = Machine(native="not built", isa=None, triton=None, interpreter=True, cuda="none")
    assert choose(_request(), interpreted, None).implementation == "reference"
    assert choose(_request(), interpreted, "triton").implementation == "triton"


def test_last_run_names_op_form_and_isa() -> None:
    pc.ops.encode(*X)
    best = [name for name, supported in native_isas() if supported][-1]
    assert pc.last_run() == pc.ops.Ran("encode", "native", best)
    with pc.use("reference"):
        pc.ops.encode(*X)
    assert pc.last_run() == pc.ops.Ran("encode", "reference", None)


def test_a_failed_call_is_not_recorded() -> None:
    pc.ops.encode(*X)
    before = pc.last_run()
    with pytest.raises(ValueError, match="encode: w_enc must"):
        pc.ops.encode(X[0], torch.ones(4, 2), X[2], X[3])
    assert pc.last_run() is before


def test_use_as_a_statement_and_nested() -> None:
    outer = pc.use("reference")
    with pc.use("native", isa="baseline"), pc.use(None):
        assert pc.explain("encode", *X).reasons[0][1] == "first that can run"
    assert pc.explain("encode", *X).implementation == "reference"
    outer.__exit__()
    assert pc.explain("encode", *X).implementation == "native"


def test_use_entered_twice() -> None:
    chosen = pc.use("reference")
    for _ in range(2):
        with chosen:
            assert pc.explain("encode", *X).implementation == "reference"
        assert pc.explain("encode", *X).implementation == "native"


def test_use_restores_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="ours"), pc.use("reference"):
        raise RuntimeError("ours")
    assert pc.explain("encode", *X).implementation == "native"


def test_use_holds_in_its_own_thread_only() -> None:
    seen: list[Any] = []
    with pc.use("reference"):
        worker = threading.Thread(target=lambda: seen.append(pc.explain("encode", *X).implementation))
        worker.start()
        worker.join()
    assert seen == ["native"]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert pc.explain("encode", *X).implementation == "reference"
    with pc.use("native"):
        assert pc.explain("encode", *X).implementation == "native"
    monkeypatch.setenv(ENVIRONMENT, "fastest")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT} must be one of native, triton, reference, got 'fastest'"):
        pc.ops.encode(*X)
    monkeypatch.setenv(ENVIRONMENT, "")
    assert pc.explain("encode", *X).implementation == "native"


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        (("cuda",), {}, "use: name must be one of native, triton, reference or None, got 'cuda'"),
        (("reference",), {"isa": "v3"}, "use: isa goes with 'native', got 'reference'"),
        (("native",), {"isa": "avx2"}, "use: isa must be one this build has .*, got 'avx2'"),
    ],
)
def test_use_refuses(args: tuple[str], kwargs: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pc.use(*args, **kwargs)
    assert pc.explain("encode", *X).implementation == "native"


def test_an_isa_this_machine_lacks() -> None:
    lacking = [name for name, supported in native_isas() if not supported]
    if not lacking:
        pytest.skip("this machine runs every ISA of the build")
    with (
        pc.use("native", isa=lacking[0]),
        pytest.raises(pc.ImplementationError, match=f"isa '{lacking[0]}' is not one this machine can run"),
    ):
        pc.ops.encode(*X)


def test_explain_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycircuit.ops.native.encode", lambda *_: pytest.fail("explain ran the op"))
    assert "encode: native" in str(pc.explain("encode", *X))
    with pytest.raises(ValueError, match=r"explain: op must be one of encode, .*, got 'embed'"):
        pc.explain("embed")
