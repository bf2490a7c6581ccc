"""Output, errors and exit codes of the command line, and Ctrl-C while it imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Run

import pycircuit as pc
from pycircuit import cli, doctor
from pycircuit.bench import library_rates, machine_rates, tour
from pycircuit.bench import report as bench_report
from pycircuit.bench.catalog import ROWS
from pycircuit.ops.registry import IMPLEMENTATIONS, OPS


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"{pc.__version__}\n", "")
    for args in ((), ("--help",)):
        done = run(*args)
        assert done.code == 0 and all(command in done.out for command in ("doctor", "demo", "bench"))


@pytest.mark.parametrize(
    ("args", "message"),
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
def test_wrong_arguments(run: Run, args: tuple[str, ...], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    assert message in done.err and done.err.startswith("pycircuit: ") and done.err.count("\n") == 1


def test_compare_refuses_a_file_that_is_no_run(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    done = run("bench", "compare", path, path)
    assert done.code == 2 and "must be a file that `pycircuit bench --json` wrote" in done.err


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("no"), 1), (KeyError("no"), 1), (ValueError("no"), 2)])
def test_failures_show_a_traceback_only_with_debug(run: Run, error: Exception, code: int, monkeypatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(doctor, "examine", fail)
    done = run("doctor")
    assert done.code == code and done.err.count("\n") == 1 and "no" in done.err
    monkeypatch.setattr(sys, "argv", ["pycircuit", "--debug", "doctor"])
    with pytest.raises(type(error), match="no"):
        cli.main()


def test_interrupted(run: Run, monkeypatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", stop)
    assert run("doctor") == (130, "", "pycircuit: stopped\n")


@pytest.mark.parametrize("script", [True, False], ids=["pycircuit", "python -m pycircuit"])
def test_ctrl_c_during_imports(script: bool, tmp_path: Path) -> None:
    """A torch that imports for a minute stands for a slow disk."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "pycircuit_script").mkdir()
    path = tmp_path / "pycircuit_script" / "pycircuit"
    path.write_text("from pycircuit.cli import main\nmain()\n")
    command = [sys.executable, str(path)] if script else [sys.executable, "-m", "pycircuit"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    child = subprocess.Popen(
        [*command, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    assert child.stdout is not None and child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, "pycircuit: stopped\n")


def test_a_process_ends_with_its_output_and_code() -> None:
    for words, code, expected in ((("bench", "--help"), 0, "Example: "), (("doctor", "--frob"), 2, "--frob")):
        done = subprocess.run([sys.executable, "-m", "pycircuit", *words], capture_output=True, text=True, check=False)
        assert done.returncode == code and expected in done.stdout + done.stderr


def test_ctrl_c_is_left_to_programs_that_import_pycircuit() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates from samples too short to be trusted: these tests look at what is reported, not how much."""
    monkeypatch.setattr(doctor, "_SECONDS", 0.01)


def test_doctor_json_and_text_agree(run: Run, short_measurements: None) -> None:
    report = json.loads(run("doctor", "--json").out)
    printed = run("doctor").out
    assert set(report["ops"]) == set(OPS)
    for op, devices in report["ops"].items():
        for plan in devices.values():
            assert {plan["implementation"], *plan["others"]} == set(IMPLEMENTATIONS)
            assert all(reason not in ("", "could run") for reason in plan["others"].values()), op
            line = next(text for text in printed.splitlines() if text.startswith(op))
            assert plan["implementation"] in line and all(name in line for name in plan["others"])
    for value in (report["cpu"], report["torch"], report["native"]["compiler"], *report["isas"]):
        assert value in printed
    counts = list(dict.fromkeys((1, machine_rates.all_threads())))
    assert [rates["threads"] for rates in report["rates"]] == counts
    for rates in report["rates"]:
        names = [f"product, {library}" for library in library_rates.libraries()]
        names += [f"multiply-adds, {isa}" for isa in rates["multiply_adds"]]
        assert rates["multiply_adds"].keys() <= report["isas"].keys()
        for name in (*names, "best product", "bfloat16 product", "copy", "read"):
            assert re.search(rf"^{rates['threads']} +{re.escape(name)} +[0-9.]+ G", printed, re.M), name
        assert rates["float32"] == max(rate for by_size in rates["products"].values() for rate in by_size.values())


def test_doctor_with_a_forced_implementation(run: Run, short_measurements: None, monkeypatch) -> None:
    monkeypatch.setenv("PYCIRCUIT_IMPL", "reference")
    assert json.loads(run("doctor", "--json").out)["ops"]["encode"]["cpu"]["implementation"] == "reference"
    monkeypatch.setenv("PYCIRCUIT_IMPL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plan = json.loads(run("doctor", "--json").out)["ops"]["encode"]["cpu"]
    assert plan["implementation"] is None and "triton was forced but cannot run" in plan["others"]["forced"]


def test_bench_writes_and_compares(run: Run, tmp_path: Path) -> None:
    first, tables = tmp_path / "first.json", tmp_path / "tables.md"
    row = ("--row", "edge_scores/small/b64-plt", "--quick", "--threads", 1, "--budget", 0.01)
    assert run("bench", *row, "--json", first, "--markdown", tables).code == 0
    (result,) = bench_report.load(first).results
    assert (result.implementation, result.failed, result.skipped) == ("native", None, None)
    assert len(result.times["native"]) >= 5 and result.error < 5e-6 and result.isa
    assert "edge_scores/small/b64-plt" in tables.read_text()
    second = tmp_path / "second.json"
    assert run("bench", *row, "--implementation", "reference", "--json", second).code == 0
    assert bench_report.load(second).results[0].implementation == "reference"
    assert "must hold a row" in run("bench", "compare", first, second).err
    done = run("bench", "compare", first, first)
    assert done.code == 0 and "1.00x" in done.out and "edge_scores/small/b64-plt" in done.out


def test_bench_fails_on_a_wrong_answer(run: Run, tmp_path: Path, monkeypatch) -> None:
    right = pc.ops.influence
    monkeypatch.setattr(pc.ops, "influence", lambda *args: right(*args) * 1.001)
    path = tmp_path / "wrong.json"
    done = run("bench", "--row", "influence/small", "--quick", "--json", path)
    assert done.code == 1 and "WRONG" in done.out
    assert all(r.failed and not r.times for r in bench_report.load(path).results)


def test_tour(run: Run) -> None:
    assert list(tour.STOPS) == list(OPS) and {name for name, _ in tour.STOPS.values()} <= {r.name for r in ROWS}
    done = run("bench", "tour")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    for op in OPS:
        assert any(text.startswith(op) and "native (" in text and "%" in text for text in lines)


@pytest.mark.parametrize("words", [("--help",), ("inspect", "demo")])
def test_a_closed_pipe_ends_a_command_quietly(words: tuple[str, ...]) -> None:
    """As `pycircuit doctor | head -1`: the reader has gone before the command writes."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pycircuit", *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
