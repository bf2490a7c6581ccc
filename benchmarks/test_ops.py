"""Times of every op: rows with all threads, the cheap ones with one too. Run it with `make bench`.

pytest-benchmark times our calls; the others are called in turn in its set-up, so that a busy moment slows all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pycircuit.bench.catalog import ROWS, Row
from pycircuit.bench.session import Session, plan

PLAN = list(plan(ROWS))


@pytest.mark.parametrize(("row", "threads"), PLAN, ids=[f"{row.name}-{threads}" for row, threads in PLAN])
def test_row(row: Row, threads: int, session: Session, benchmark: BenchmarkFixture) -> None:
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled; run `make bench`")
    benchmark.group = row.op

    def drive(call: Callable[[], Any], before: Callable[[], None], rounds: int) -> list[float]:
        benchmark.pedantic(call, setup=before, rounds=rounds, iterations=1)
        return list(benchmark.stats.stats.data)

    result = session.run(row, threads, drive)
    assert result.failed is None
    if result.skipped:
        pytest.skip(result.skipped)
    benchmark.extra_info.update({"of floor": result.share, "error": result.error, "others": result.others})
