"""Tests of `make bench-peers`: rows or a selection that differ give no ratio."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from circuit_tracer_cases import PLANS, Compared, agreement, agrees
from circuit_tracer_report import table_row

from pycircuit.bench.whole_trace import Traced


def random_result(count: int = 200, seed: int = 0) -> dict[str, Any]:
    g = np.random.default_rng(seed)
    features = np.stack([g.integers(0, 8, count), g.integers(0, 4096, count), np.arange(count)], 1)
    return {"active": features, "selected": features, "rows": g.normal(size=(count + 2, count + 30))}


def test_equal_rows_agree_and_a_wrong_one_does_not() -> None:
    ours, theirs = random_result(), random_result()
    assert agreement(ours, theirs) == {"active": 1, "chosen": 1, "rows": 0}
    ours["rows"][-1, 3] += 1e-2
    worst = agreement(ours, theirs)
    assert worst["rows"] == pytest.approx(1e-2 / np.linalg.norm(theirs["rows"][-1])) and not agrees(worst)


def test_rows_are_matched_by_feature_not_by_place() -> None:
    ours, theirs = random_result(), random_result()
    order = np.random.default_rng(1).permutation(200)
    ours["selected"] = ours["selected"][order]
    ours["rows"] = ours["rows"][np.r_[order, 200, 201]][:, np.r_[order, 200:230]]
    assert agreement(ours, theirs)["rows"] == 0


def test_another_selection_is_not_agreement() -> None:
    ours, theirs = random_result(), random_result()
    ours["selected"] = ours["selected"].copy()
    ours["selected"][:3, 2] += 1000
    got = agreement(ours, theirs)
    assert got["chosen"] == 197 / 200 and got["rows"] == 0 and not agrees(got)


@pytest.mark.parametrize("wrong", ["rows", "certificate"])
def test_no_ratio_without_agreement(wrong: str) -> None:
    plan = PLANS["tiny"]
    cases = {
        name: Traced("tiny", name, 2, times=[seconds], timings=timings, certificate=certificate)
        for name, seconds, timings, certificate in (
            ("tiny/circuit-tracer/batch 4", 8.0, {}, None),
            ("tiny/native/batch 4", 2.0, {"sweep": 1.0}, 1e-3 if wrong == "certificate" else 1e-7),
        )
    }
    rows = 1e-3 if wrong == "rows" else 1e-6
    shares = {"tiny/native/batch 4": {"active": 1.0, "chosen": 1.0, "rows": rows}}
    compared = Compared(plan, cases, shares, [])
    assert not compared.right
    assert "4.0x" not in table_row(compared, cases["tiny/native/batch 4"], 1e9)
    shares["tiny/native/batch 4"]["rows"] = cases["tiny/native/batch 4"].certificate = 1e-7
    assert compared.right and "4.0x" in table_row(compared, cases["tiny/native/batch 4"], 1e9)
