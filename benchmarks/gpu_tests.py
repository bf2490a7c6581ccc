"""Tests that need a card, every outcome saved at once: a failure marks the report and the run goes on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gpu_files import ROOT, Section

PROCESSES = 6  # where pytest-xdist is installed: they compile side by side


class Recorder:
    """Pytest plugin that saves every test's outcome."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.outcomes: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        outcome: dict[str, Any] = {"outcome": report.outcome, "seconds": report.duration}
        if report.outcome != "passed":
            outcome["why"] = str(report.longrepr)[-1500:]
        self.outcomes[report.nodeid] = outcome
        self.section.save("outcomes", self.outcomes)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = {"outcome": "failed", "why": str(report.longrepr)[-1500:]}
            self.section.save("outcomes", self.outcomes)


def files_with_gpu_tests(folder: Path) -> list[Path]:
    """Files with a test marked for a GPU: importing all others takes longer than these tests."""
    if folder.is_file():
        return [folder]
    files = [file for pattern in ("test_*.py", "gpu/test_*.py") for file in sorted(folder.glob(pattern))]
    return [file for file in files if "mark.gpu" in file.read_text()]


def run_tests(section: Section) -> None:
    """Run every GPU test; in a dry run they are collected and skipped, with their reasons."""
    options = ["-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    options += ["--continue-on-collection-errors"]
    options += ["-c", str(ROOT / "pyproject.toml"), f"--junitxml={section.results / 'tests.xml'}"]
    if find_spec("pytest_timeout"):
        options += ["--timeout", "60"]
    if find_spec("xdist") and not section.dry:
        options += ["-n", str(PROCESSES)]
    section.save("options", options)
    files = files_with_gpu_tests(section.tests)
    if not files:
        section.mark(f"no test is marked for a GPU in {section.tests}")
        return
    recorder = Recorder(section)
    status = int(pytest.main([*options, *map(str, files)], plugins=[recorder]))
    counts: dict[str, int] = {}
    for outcome in recorder.outcomes.values():
        counts[outcome["outcome"]] = counts.get(outcome["outcome"], 0) + 1
    section.save("counts", counts)
    section.save("exit status", status)
    if status or not (counts.get("passed") or section.dry):
        section.mark(f"{counts}, pytest's exit status {status}")
