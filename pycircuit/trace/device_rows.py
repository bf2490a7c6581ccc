"""Packing, cutting and ranking of edge rows on a device, in a few launches for many rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .columns import Columns
from .memory_model import DEVICE_BLOCK
from .row_store import StoreSize


@dataclass(frozen=True, eq=False)
class DeviceRows:
    """Edge rows as CSR, on their device. lengths: [rows] int64; column: [entries] int32; weight: [entries].

    dropped, mass: [rows] float64, the sum of the entries left out and of their absolute values, None where nothing was;
    magnitude: [rows] float64, the sum of the absolute values of all entries, None where rows are not ranked.
    """

    lengths: Tensor
    column: Tensor
    weight: Tensor
    dropped: Tensor | None = None
    mass: Tensor | None = None
    magnitude: Tensor | None = None


def packed(rows: Tensor, keep: int | None, ranked: bool = False) -> Iterator[DeviceRows]:
    """Yield the nonzero entries of rows [rows, columns], or the `keep` largest of each row, many rows at a time."""
    numbers = DEVICE_BLOCK if keep is None else DEVICE_BLOCK // 2  # cutting takes twice the memory
    for block in rows.split(max(1, numbers // max(1, rows.shape[1]))):
        magnitude = _magnitude(block) if ranked else None
        yield pack(block, magnitude) if keep is None else cut(block, keep, magnitude)


def pack(block: Tensor, magnitude: Tensor | None) -> DeviceRows:
    """Return every nonzero entry of block [rows, columns]."""
    return DeviceRows(block.count_nonzero(1), *_entries(block, block), magnitude=magnitude)


def cut(block: Tensor, keep: int, magnitude: Tensor | None) -> DeviceRows:
    """Return the `keep` largest entries of each row of block [rows, columns]; of equal ones those in lower columns."""
    chosen = _largest(block.abs(), keep)
    dropped_entries = block.masked_fill(chosen, 0)
    dropped, mass = dropped_entries.sum(1, dtype=torch.float64), _magnitude(dropped_entries)
    del dropped_entries
    return DeviceRows(chosen.sum(1), *_entries(block, chosen), dropped, mass, magnitude)


def _largest(size: Tensor, keep: int) -> Tensor:
    """Return a mask of the `keep` largest of each row, no zeros: [rows, columns] bool; lower columns of equals."""
    cutoff = size.topk(min(max(keep, 1), size.shape[1]), sorted=False).values.amin(1, keepdim=True)
    above, equal = size > cutoff, (size == cutoff) & (size > 0)
    missing = keep - above.sum(1, keepdim=True)
    return above.logical_or_(equal.logical_and_(equal.cumsum(1, dtype=torch.int32) <= missing))


def _entries(block: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return (column, weight) of the entries of block where `chosen` is not zero. The host waits for their number."""
    index = chosen.reshape(-1).nonzero()[:, 0]
    weight = block.reshape(-1).index_select(0, index)
    return index.remainder_(block.shape[1]).to(torch.int32), weight


def _magnitude(block: Tensor) -> Tensor:
    """Return float64 sums of absolute values: [rows]."""
    return torch.linalg.vector_norm(block, 1, dim=1, dtype=torch.float64)


class RankedRows:
    """Packed rows that stay on a device, which ranks features by them.

    starts: [layers], where the features of each layer begin among the columns.
    """

    def __init__(self, like: Tensor, size: StoreSize, columns: Columns) -> None:
        """like: a tensor of the edges' type, on their device."""
        self.columns = columns.count
        self.starts = torch.tensor(columns.feature_start[:-1], device=like.device)
        self.column = like.new_empty(size.entries, dtype=torch.int32)
        self.weight = like.new_empty(size.entries)
        self.lengths = like.new_empty(size.rows, dtype=torch.int64)
        self.magnitude = like.new_empty(size.rows, dtype=torch.float64)
        self.count = self.entries = 0

    def append(self, rows: DeviceRows) -> None:
        assert rows.magnitude is not None
        count, entries = self.count + len(rows.lengths), self.entries + len(rows.column)
        self.column[self.entries : entries] = rows.column
        self.weight[self.entries : entries] = rows.weight
        self.lengths[self.count : count] = rows.lengths
        self.magnitude[self.count : count] = rows.magnitude
        self.count, self.entries = count, entries

    def influence(self, order: Tensor, node: Tensor, weight: Tensor) -> Tensor:
        """Return the influence of every column: [columns] float64. Arguments as `RowStore.influence` takes them.

        Entries that were cut off take their share and hand nothing on.
        """
        layer = torch.bucketize(node, self.starts, right=True)  # 0 of an output, whose node is -1
        numbers = torch.cat([order, layer, self.lengths[: self.count]]).cpu().numpy()
        total, count = weight.new_zeros(self.columns, dtype=torch.float64), len(order)
        rows, layers, lengths = np.split(numbers, (count, 2 * count))
        for begin, end, first, last in runs(rows, layers, lengths):
            entering = weight[begin:end].double()
            if layers[begin]:
                entering += total[node[begin:end]]
            own = slice(rows[begin], rows[begin] + end - begin)
            magnitude = self.magnitude[own]
            factor = torch.where(magnitude > 0, entering / magnitude, 0)
            share = factor.repeat_interleave(self.lengths[own], output_size=last - first)
            total.index_add_(0, self.column[first:last], share.mul_(self.weight[first:last].abs()))
        return total


def runs(
    order: np.ndarray, layer: np.ndarray, lengths: np.ndarray, max_entries: int = DEVICE_BLOCK
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (begin, end, first, last): order[begin:end] are rows of one layer, stored as entries first .. last.

    Rows of one layer hand nothing to one another. max_entries: of a run, unless a single row has more.
    """
    ends = lengths.cumsum()
    breaks = np.flatnonzero((np.diff(order) != 1) | (np.diff(layer) != 0)) + 1
    for begin, end in pairwise([0, *breaks.tolist(), len(order)]):
        while begin < end:
            row = order[begin]
            first = ends[row] - lengths[row]
            count = np.searchsorted(ends[row : row + end - begin], first + max_entries, side="right")
            stop = begin + max(1, int(count))
            yield begin, stop, int(first), int(ends[row + stop - begin - 1])
            begin = stop
