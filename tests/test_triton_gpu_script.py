"""benchmarks/gpu.py where there is no GPU: it says so at once, and its dry run goes through every step but the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pycircuit.ops.registry import OPS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_no_gpu_is_one_clear_sentence(tmp_path: Path) -> None:
    done = script("--results", str(tmp_path / "results"), "--environment", str(tmp_path / "environment"))
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: needs a CUDA device, found none")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []  # nothing was installed or written first


def test_unknown_section_is_refused() -> None:
    done = script("--section", "everything")
    assert done.returncode == 2
    assert all(op in done.stderr for op in OPS)


@pytest.mark.parametrize("section", ["decode", "attend_back", "influence"])
def test_dry_run_says_what_it_is(tmp_path: Path, section: str) -> None:
    done = script("--device", "cpu", "--installed", "--results", str(tmp_path), "--section", section)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / f"gpu-dry-run-{section}.json").read_text())
    assert "not a GPU figure" in report["dry_run"] and report["dry_run"] in done.stdout
    assert {row["op"] for row in report["rows"]} == {section}
    assert all(row["ms"] > 0 and row["error"] < 1e-5 for row in report["rows"])
    assert set(report["rates"]) == {"fp32", "tf32", "bf16", "copy"}


def test_dry_run_of_tuning_reports_the_recorded_choice(tmp_path: Path) -> None:
    done = script("--device", "cpu", "--installed", "--results", str(tmp_path), "--section", "tune_decode")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu-dry-run-tune_decode.json").read_text())["tune"]
    assert [row["shape"].split(":")[0] for row in rows] == ["float32", "bfloat16"]
    assert all(row["tried"] == 1 and row["chosen"] == row["best"] for row in rows)
