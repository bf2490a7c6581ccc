"""Rows packed, cut and ranked as a device does it, by the CPU and by a GPU if there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
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
)
from graphs import random_graph

from pycircuit.graph import Rows
from pycircuit.trace.device_export import Exporter
from pycircuit.trace.device_rows import runs
from pycircuit.trace.row_store import GrowableArray

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
DTYPES = [torch.float32, torch.float64]


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", KEEPS)
def test_packing(device: str, dtype: torch.dtype, keep: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_packing(device, dtype, keep, monkeypatch)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranked", [True, False], ids=["ranked there", "ranked by the host"])
@pytest.mark.parametrize("keep", [None, 5, 1000])
def test_store(
    device: str, dtype: torch.dtype, keep: int | None, ranked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_store(device, dtype, keep, ranked, monkeypatch)


@on_devices
@pytest.mark.parametrize("keep", [None, 5])
def test_dense_rows(device: str, keep: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_dense(device, keep, monkeypatch)


@on_devices
@pytest.mark.parametrize("after", [1, 2, 6])
def test_interrupted(device: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_interrupted(device, after, monkeypatch)


@on_devices
def test_rows_of_a_checkpoint(device: str) -> None:
    check_restored(device)


@on_devices
def test_export(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_export(device, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_export_of_many_buffers() -> None:
    """Half a gigabyte goes through the buffers of a trace while the device works on."""
    exporter, array = Exporter(torch.device("cuda")), GrowableArray(np.float32, 1 << 27)
    for begin in range(0, 1 << 27, 1 << 23):
        exporter.append(torch.arange(begin, begin + (1 << 23), device="cuda").remainder_(1 << 20).float(), array)
    exporter.finish()
    assert np.array_equal(array.view(), np.tile(np.arange(1 << 20, dtype=np.float32), 1 << 7))


def test_runs_are_of_one_layer_and_of_few_entries() -> None:
    order, layer = np.array([0, 1, 2, 5, 6, 3, 4, 7]), np.array([0, 0, 0, 3, 3, 2, 1, 1])
    lengths = np.array([4, 0, 3, 9, 2, 1, 5, 0])
    stretches = list(runs(order, layer, lengths, max_entries=6))
    assert stretches == [(0, 2, 0, 4), (2, 3, 4, 7), (3, 5, 18, 24), (5, 6, 7, 16), (6, 7, 16, 18), (7, 8, 24, 24)]


def test_trusted_rows_are_checked_by_a_second_graph() -> None:
    """A graph made of changed rows checks them again."""
    graph = random_graph()
    rows = Rows.trusted(graph.rows.row_ptr, graph.rows.column, graph.rows.weight.clone(), finite=True)
    made = replace(graph, rows=rows)
    made.rows.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"rows.weight must be finite, got nan at 3"):
        replace(made)


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuses(*size: Any, pin_memory: bool = False, **options: Any) -> Any:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", refuses)
    exporter, array = Exporter(torch.device("cuda")), GrowableArray(np.float32, 3)
    exporter.append(torch.tensor([1.0, 2.0]), array)
    exporter.finish()
    assert array.view().tolist() == [1, 2]
