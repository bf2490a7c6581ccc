"""The command line in this process: what it prints, where its errors go, its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import Run, runner

import pycircuit as pc
from pycircuit import cli, doctor
from pycircuit.bench import report, tour
from pycircuit.bench.catalog import ROWS
from pycircuit.ops.registry import IMPLEMENTATIONS, OPS


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


def test_version_and_help(run) -> None:
    assert run("--version") == (0, f"{pc.__version__}\n", "")
    for args in ((), ("--help",)):
        done = run(*args)
        assert done.code == 0 and all(command in done.out for command in ("doctor", "demo", "bench"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("frob",), "No such command 'frob'"),
        (("doctor", "--frob"), "--frob"),
        (("bench", "compare", "a.json"), "'second'"),
        (("bench", "compare", "a.json", "b.json"), "a.json: No such file or directory"),
        (("bench", "--row", "long/b16", "--quick"), "row 'long/b16' among the quick ones must name a row, got none"),
        (("bench", "--op", "frob"), "op 'frob' must name a row, got none"),
        (("bench", "--shape", "frob"), "shape 'frob' must name a row"),
        (("bench", "--threads", "0"), "threads must be positive numbers or 'all'"),
        (("bench", "--implementation", "frob"), "implementation must be one of native, triton, reference"),
        (("bench", "--json", "nowhere/x.json"), "must be in a directory that exists"),
    ],
)
def test_wrong_arguments(run, args: tuple[str, ...], says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    assert says in done.err and done.err.startswith("pycircuit: ") and done.err.count("\n") == 1


def test_a_file_that_is_no_run(run, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    done = run("bench", "compare", path, path)
    assert done.code == 2 and "must be a file that `pycircuit bench --json` wrote" in done.err


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("no"), 1), (KeyError("no"), 1), (ValueError("no"), 2)])
def test_failures_show_a_traceback_only_with_debug(run, error: Exception, code: int, monkeypatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(doctor, "examine", fail)
    done = run("doctor")
    assert done.code == code and done.err.count("\n") == 1 and "no" in done.err
    monkeypatch.setattr(sys, "argv", ["pycircuit", "--debug", "doctor"])
    with pytest.raises(type(error), match="no"):
        cli.main()


def test_interrupted(run, monkeypatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", stop)
    assert run("doctor") == (130, "", "pycircuit: stopped\n")


def test_doctor_json_and_text_agree(run) -> None:
    found = json.loads(run("doctor", "--json").out)
    printed = run("doctor").out
    assert set(found["ops"]) == set(OPS)
    for op, devices in found["ops"].items():
        for plan in devices.values():
            assert {plan["implementation"], *plan["others"]} == set(IMPLEMENTATIONS)
            assert all(why not in ("", "could run") for why in plan["others"].values()), op
            line = next(text for text in printed.splitlines() if text.startswith(op))
            assert plan["implementation"] in line and all(name in line for name in plan["others"])
    for value in (found["cpu"], found["torch"], found["native"]["compiler"], *found["isas"]):
        assert value in printed


def test_doctor_with_a_forced_implementation(run, monkeypatch) -> None:
    monkeypatch.setenv("PYCIRCUIT_IMPL", "reference")
    assert json.loads(run("doctor", "--json").out)["ops"]["encode"]["cpu"]["implementation"] == "reference"
    monkeypatch.setenv("PYCIRCUIT_IMPL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plan = json.loads(run("doctor", "--json").out)["ops"]["encode"]["cpu"]
    assert plan["implementation"] is None and "triton was forced but cannot run" in plan["others"]["forced"]


def test_bench_writes_and_compares(run, tmp_path: Path) -> None:
    first, tables = tmp_path / "first.json", tmp_path / "tables.md"
    row = ("--row", "edge_scores/small/b64-plt", "--quick", "--threads", 1, "--budget", 0.01)
    assert run("bench", *row, "--json", first, "--markdown", tables).code == 0
    (result,) = report.load(first).results
    assert (result.implementation, result.failed, result.skipped) == ("native", None, None)
    assert len(result.times["native"]) >= 5 and result.error < 5e-6 and result.isa
    assert "edge_scores/small/b64-plt" in tables.read_text()
    second = tmp_path / "second.json"
    assert run("bench", *row, "--implementation", "reference", "--json", second).code == 0
    assert report.load(second).results[0].implementation == "reference"
    assert "must hold a row" in run("bench", "compare", first, second).err
    done = run("bench", "compare", first, first)
    assert done.code == 0 and "1.00x" in done.out and "edge_scores/small/b64-plt" in done.out


def test_bench_fails_on_a_wrong_answer(run, tmp_path: Path, monkeypatch) -> None:
    right = pc.ops.influence
    monkeypatch.setattr(pc.ops, "influence", lambda *args: right(*args) * 1.001)
    kept = tmp_path / "wrong.json"
    done = run("bench", "--row", "influence/small", "--quick", "--json", kept)
    assert done.code == 1 and "WRONG" in done.out
    assert all(r.failed and not r.times for r in report.load(kept).results)


def test_tour(run) -> None:
    assert list(tour.STOPS) == list(OPS) and {name for name, _ in tour.STOPS.values()} <= {r.name for r in ROWS}
    done = run("bench", "tour")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    for op in OPS:
        assert any(text.startswith(op) and "native (" in text and "%" in text for text in lines)
