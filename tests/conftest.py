"""Fixtures of several test modules, and the rule that every skip has a good reason.

Without a CUDA device, Triton kernels run in its interpreter, which must be chosen before triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from skip_reasons import unexplained

if TYPE_CHECKING:
    from cli_world import World
    from commands import Run

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Dense products by our own kernel, whatever this machine has measured or would measure next to other workers.
os.environ.setdefault("PYCIRCUIT_PRODUCT", "native")

# The same examples on every machine and every run.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("fixed")

SKIPPED: list[tuple[str, str]] = []  # (test, reason), from every worker


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    optional = report.nodeid.startswith(("tests/peers/", "tests/real/"))  # they need packages of their own
    if report.skipped and not optional and isinstance(report.longrepr, tuple):
        SKIPPED.append((report.nodeid, report.longrepr[2].removeprefix("Skipped: ")))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a skip has no good reason; with workers, only the process that collects their reports does."""
    if not hasattr(session.config, "workerinput") and unexplained(SKIPPED) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for skip in unexplained(SKIPPED):
        terminalreporter.write_line(f"SKIPPED WITHOUT A GOOD REASON {skip}", red=True)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: run("attribute", ...) returns code, out and err."""
    from commands import runner

    return runner(monkeypatch, capsys)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an implementation of an op is chosen: only implementations allocate outputs."""
    monkeypatch.setattr("pycircuit.ops.plan", lambda request: pytest.fail(f"{request.op} passed its checks"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny model, texts and transcoders in files."""
    from cli_world import make_world

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests that train again and compare bits
    try:
        return make_world(tmp_path_factory.mktemp("world"))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for a module whose tensors are tiny, where more threads cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own; absent until something is written."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
