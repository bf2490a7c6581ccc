"""The command line: what it says, its exit codes, and no traceback for anybody's mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pycircuit as pc
from pycircuit import doctor
from pycircuit.ops.dispatch import native_isas
from pycircuit.ops.registry import IMPLEMENTATIONS, OPS


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pycircuit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "a.json"
    done = run("bench", "--row", "decode/small/plt", "--budget", "0.01", "--threads", "1", "--json", path)
    assert done.returncode == 0, done.stderr
    assert "decode/small/plt [1, " in done.stdout
    return path


def test_doctor_names_what_runs() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["isas"] == dict(native_isas())
    for op in OPS:
        plan = found["ops"][op]["cpu"]
        assert (plan["implementation"], plan["isa"]) == ("native", [n for n, ok in native_isas() if ok][-1])
        assert set(plan["others"]) == set(IMPLEMENTATIONS) - {"native"}


def test_doctor_for_people() -> None:
    said = run("doctor").stdout
    found = doctor.examine()
    assert found["cpu"] in said and found["torch"] in said
    assert all(op in said for op in OPS)
    assert "could run" in said


def test_version() -> None:
    assert run("--version").stdout.strip() == pc.__version__


def test_bench_json_keeps_every_sample(measured: Path) -> None:
    whole = json.loads(measured.read_text())
    (row,) = whole["rows"]
    assert row["name"] == "decode/small/plt" and row["failed"] is None
    assert len(row["times"]["native"]) >= 5 and len(row["times"]["reference"]) >= 2
    assert 0 < row["error"] < 5e-6
    assert whole["rates"][0]["threads"] == 1 and whole["rates"][0]["float32"] > 1e8


def test_compare(measured: Path) -> None:
    done = run("bench", "compare", measured, measured)
    assert done.returncode == 0, done.stderr
    assert "decode/small/plt" in done.stdout and "1.00x" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "--op", "sing"), "'sing' must name a row"),
        (("bench", "--threads", "none"), "threads must be positive numbers or 'all'"),
        (("bench", "--implementation", "gpu"), "implementation must be one of native, triton, reference"),
        (("bench", "--row", "decode/small/plt", "--isa", "v9"), "isa must be one this build has"),
        (("bench", "--json", "no/such/place.json"), "must be in a directory that exists"),
        (("bench", "compare", "no.json", "no.json"), "no.json: No such file or directory"),
        (
            ("bench", "compare", "pyproject.toml", "pyproject.toml"),
            "must be a file that `pycircuit bench --json` wrote",
        ),
    ],
    ids=["op", "threads", "implementation", "isa", "place", "missing", "foreign"],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run("--debug", "bench", "--op", "sing").stderr


def test_unknown_command() -> None:
    done = run("sing")
    assert done.returncode == 2 and "Traceback" not in done.stderr
