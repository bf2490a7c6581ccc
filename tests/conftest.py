"""Without a CUDA device Triton kernels run in its interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every machine and every run.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("fixed")

SKIPPED: list[tuple[str, str]] = []  # (test, reason)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        SKIPPED.append((report.nodeid, report.longrepr[2].removeprefix("Skipped: ")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What counts the skips runs last."""
    items.sort(key=lambda item: item.name == "test_skips_have_known_reasons")


@pytest.fixture
def skipped() -> list[tuple[str, str]]:
    return SKIPPED


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose tensors are tiny: threads that wait for each other cost far more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
