"""Checks that rows packed, cut, ranked and exported by any device are the CPU's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pycircuit.graph import Rows
from pycircuit.trace import device_export, device_rows
from pycircuit.trace.columns import Columns
from pycircuit.trace.device_export import Exporter
from pycircuit.trace.device_rows import DeviceRows
from pycircuit.trace.device_store import DeviceStore
from pycircuit.trace.row_store import GrowableArray, PackedRows, RowStore, StoreSize

KEEPS = (None, 0, 1, 3, 7, 40, 100)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])  # of outputs


def block(dtype: torch.dtype) -> Tensor:
    """Return [11, 40] with zeros of both signs, entries of equal size, a row of zeros and one of equal entries."""
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(11, 40, generator=g).to(dtype)
    rows[torch.rand(11, 40, generator=g) < 0.3] = 0
    rows[2:6] = rows[2:6].sign() * (rows[2:6].abs() * 2).round()
    rows[6], rows[7], rows[8, ::3] = 0, -1.5, -0.0
    return rows


def check_packing(device: str, dtype: torch.dtype, keep: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check rows packed six at a time, or cut three at a time: to the bit, but for sums of dropped entries."""
    monkeypatch.setattr(device_rows, "DEVICE_BLOCK", 250)
    dense = block(dtype)
    truth, dropped, mass = Rows.from_dense(dense, keep)
    blocks = list(device_rows.packed(dense.to(device), keep, ranked=True))
    assert len(blocks) == (2 if keep is None else 4)
    assert all(p.weight.device.type == torch.device(device).type for p in blocks)
    lengths, column, weight, magnitude = (_joined(blocks, n) for n in ("lengths", "column", "weight", "magnitude"))
    assert np.array_equal(lengths, truth.lengths())
    assert torch.equal(column, truth.column) and column.dtype == torch.int32
    assert torch.equal(weight, truth.weight)
    torch.testing.assert_close(magnitude, dense.double().abs().sum(1), atol=0, rtol=1e-14)
    for name, expected in (("dropped", dropped), ("mass", mass)):
        if keep is None:
            assert all(getattr(p, name) is None for p in blocks)
        else:
            torch.testing.assert_close(_joined(blocks, name), expected, atol=1e-14, rtol=1e-14)


def _joined(blocks: list[DeviceRows], name: str) -> Tensor:
    return torch.cat([getattr(rows, name).cpu() for rows in blocks])


@dataclass
class SmallTrace:
    """Rows of a small trace: three outputs, then features in two rounds, each from the highest layer down."""

    columns: Columns
    layer: list[int]
    position: list[int]
    node: Tensor
    edges: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order, node and weight, as `influence` takes them."""
        falling = torch.argsort(torch.tensor(self.layer[3:]), descending=True, stable=True)
        weight = torch.zeros(len(self.layer)).to(self.edges.dtype)
        weight[:3] = WEIGHTS
        outputs = torch.arange(3)
        return torch.cat([outputs, 3 + falling]), torch.cat([torch.full((3,), -1), self.node[falling]]), weight


def small_trace(dtype: torch.dtype) -> SmallTrace:
    """Return rows of a small trace, whose layer 1 has no features."""
    g = torch.Generator().manual_seed(5)
    counts = torch.tensor([[4, 3, 5], [0, 0, 0], [2, 6, 1], [3, 3, 3]])
    columns = Columns(torch.cat([torch.zeros(4, 1, dtype=torch.int64), counts.cumsum(1)], 1).numpy(), 3)
    layer = torch.arange(4).repeat_interleave(counts.sum(1))
    position = torch.arange(3).repeat(4).repeat_interleave(counts.reshape(-1))
    rounds = torch.randperm(len(layer), generator=g)[:24].split(10)
    node = torch.cat([chosen[torch.argsort(layer[chosen], descending=True, stable=True)] for chosen in rounds])
    layers, positions = [4, 4, 4, *layer[node].tolist()], [2, 1, 2, *position[node].tolist()]
    edges = torch.zeros(len(layers), columns.count, dtype=dtype)
    for row, target_layer, target_position in zip(edges, layers, positions, strict=True):
        for begin, end in columns.cone(target_layer, target_position):
            weights, visible = torch.randn(end - begin, generator=g), torch.rand(end - begin, generator=g) < 0.8
            row[begin:end] = (weights * visible).to(dtype)
    edges[5] = 0  # a row through which no influence runs
    return SmallTrace(columns, layers, positions, node, edges)


def filled_store(kind: Any, trace: SmallTrace, device: str, dense: bool, keep: int | None, *options: Any) -> Any:
    """Return a store with all rows, added in tiles of seven."""
    entries, count = int((trace.edges != 0).sum()), len(trace.edges)
    store = kind(trace.columns, trace.edges.to(device), StoreSize(count, dense, keep, entries, 7), *options)
    for begin in range(0, count, 7):
        tile = slice(begin, min(begin + 7, count))
        rows = store.next_block(len(trace.edges[tile]))
        rows.copy_(trace.edges[tile].to(device))
        store.export_committed()
        store.add(rows, trace.layer[tile], trace.position[tile])
    return store


def check_store(
    device: str, dtype: torch.dtype, keep: int | None, ranked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check influence through rows ranked by the device or by the host, and the rows on the host at the end."""
    monkeypatch.setattr(device_rows, "DEVICE_BLOCK", 130)
    monkeypatch.setattr(device_export, "STAGING_BYTES", 256)
    trace = small_trace(dtype)
    truth = filled_store(RowStore, trace, "cpu", False, keep)
    store = filled_store(DeviceStore, trace, device, False, keep, ranked)
    expected = truth.influence(*trace.arguments)
    got = store.influence(*(t.to(device) for t in trace.arguments))
    assert got.device.type == torch.device(device).type and got.dtype == dtype
    torch.testing.assert_close(got.cpu(), expected, atol=1e-7, rtol=1e-6)
    assert float(expected.abs().sum()) > 0
    assert_same(store.finish(), truth.finish())


def check_dense(device: str, keep: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check dense rows that are packed at the end, or at once for a checkpoint."""
    monkeypatch.setattr(device_rows, "DEVICE_BLOCK", 130)
    trace = small_trace(torch.float32)
    store = filled_store(DeviceStore, trace, device, True, keep)
    packed = store.pack(trace.edges.to(device), trace.layer, trace.position)
    truth = filled_store(RowStore, trace, "cpu", False, keep).finish()
    assert_same(packed, truth)
    assert_same(store.finish(), truth)


def check_interrupted(device: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that an interrupted export of dense rows loses none and doubles none."""
    monkeypatch.setattr(device_rows, "DEVICE_BLOCK", 130)
    trace, remaining, append = small_trace(torch.float32), [after], Exporter.append

    def interrupted(self: Exporter, source: Tensor, array: GrowableArray) -> None:
        remaining[0] -= 1
        if not remaining[0]:
            raise KeyboardInterrupt
        append(self, source, array)

    store = filled_store(DeviceStore, trace, device, True, None)
    monkeypatch.setattr(Exporter, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.export_committed()
    assert_same(store.finish(), filled_store(RowStore, trace, "cpu", False, None).finish())


def check_restored(device: str) -> None:
    """Check that a checkpoint's rows are ranked with the others, and are checked when they become a graph's."""
    trace = small_trace(torch.float32)
    stores = [filled_store(RowStore, trace, "cpu", False, 9), filled_store(DeviceStore, trace, device, False, 9, True)]
    saved = stores[0].finish()
    size = StoreSize(len(saved), False, 9, len(saved.column), 7)
    restored = DeviceStore(trace.columns, trace.edges.to(device), size, True)
    restored.restore(saved, trace.layer, trace.position)
    arguments = [t.to(device) for t in trace.arguments]
    torch.testing.assert_close(restored.influence(*arguments), stores[1].influence(*arguments), atol=1e-7, rtol=1e-6)
    got = restored.finish()
    assert_same(got, saved)
    assert stores[1].finish().trusted and not got.trusted


def assert_same(got: PackedRows, expected: PackedRows) -> None:
    for name in ("lengths", "column", "weight"):
        assert np.array_equal(getattr(got, name), getattr(expected, name)), name
        assert getattr(got, name).dtype == getattr(expected, name).dtype
    for name in ("dropped", "mass"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-13, atol=1e-13)


def check_export(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check exports of several types and sizes, through buffers that are smaller than most of them."""
    monkeypatch.setattr(device_export, "STAGING_BYTES", 4096)
    exporter, g = Exporter(torch.device(device)), torch.Generator().manual_seed(1)
    arrays = {torch.float32: GrowableArray(np.float32, 0), torch.int32: GrowableArray(np.int32, 50_000)}
    arrays[torch.float64] = GrowableArray(np.float64, 7)
    appended: dict[torch.dtype, list[Tensor]] = {dtype: [] for dtype in arrays}
    for size in (1, 0, 3000, 17, 1024, 1025, 9999, 5):
        for dtype, array in arrays.items():
            values = (torch.randn(size, generator=g) * 1000).to(dtype)
            exporter.append(values.to(device), array)
            appended[dtype].append(values)
    for _ in range(2):
        exporter.finish()
        for dtype, array in arrays.items():
            assert np.array_equal(array.view(), torch.cat(appended[dtype]).numpy())
    exporter.append(torch.arange(5.0, device=device), arrays[torch.float32])
    exporter.finish()
    assert arrays[torch.float32].view()[-5:].tolist() == [0, 1, 2, 3, 4]
