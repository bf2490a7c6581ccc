"""Without a CUDA device Triton kernels run in its interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from skip_reasons import unexplained

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every machine and every run.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("fixed")

SKIPPED: list[tuple[str, str]] = []  # (test, reason), of every worker


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    elsewhere = report.nodeid.startswith(("tests/peers/", "tests/real/"))  # which need more than this machine
    if report.skipped and not elsewhere and isinstance(report.longrepr, tuple):
        SKIPPED.append((report.nodeid, report.longrepr[2].removeprefix("Skipped: ")))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skip without a good reason fails the run; workers leave that to the one that collects their reports."""
    if not hasattr(session.config, "workerinput") and unexplained(SKIPPED) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for skip in unexplained(SKIPPED):
        terminalreporter.write_line(f"SKIPPED WITHOUT A GOOD REASON {skip}", red=True)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose tensors are tiny: threads that wait for each other cost far more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own; absent until something is written."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
