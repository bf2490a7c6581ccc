"""Rows packed, cut, ranked and exported by the pretended device, and how often the host waits for it."""

from __future__ import annotations

import pytest
import torch
from device_row_cases import (
    KEEPS,
    check_dense,
    check_export,
    check_interrupted,
    check_packing,
    check_restored,
    check_store,
    filled_store,
    small_trace,
)
from pretended_cuda import Counts

from pycircuit.trace.device_store import DeviceStore

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", KEEPS)
def test_packing(dtype: torch.dtype, keep: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_packing("cuda", dtype, keep, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranked", [True, False], ids=["ranked there", "ranked by the host"])
@pytest.mark.parametrize("keep", [None, 5, 1000])
def test_store(dtype: torch.dtype, keep: int | None, ranked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_store("cuda", dtype, keep, ranked, monkeypatch)


@pytest.mark.parametrize("keep", [None, 5])
def test_dense_rows(keep: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_dense("cuda", keep, monkeypatch)


@pytest.mark.parametrize("after", [1, 2, 6])
def test_interrupted(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_interrupted("cuda", after, monkeypatch)


def test_rows_of_a_checkpoint() -> None:
    check_restored("cuda")


def test_export(monkeypatch: pytest.MonkeyPatch) -> None:
    check_export("cuda", monkeypatch)


@pytest.mark.parametrize("keep", [None, 5])
def test_waits(keep: int | None, counts: Counts) -> None:
    """The host waits once a tile for the number of its entries, once a ranking, and once for all exports."""
    trace = small_trace(torch.float32)
    store = filled_store(DeviceStore, trace, "cuda", False, keep, True)
    assert counts.totals()[0] == 4
    arguments = [t.to("cuda") for t in trace.arguments]
    for waits in (5, 6):
        store.influence(*arguments)
        assert counts.totals()[0] == waits
    store.finish()
    assert counts.totals()[0] == 7
