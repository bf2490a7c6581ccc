"""Edge rows packed, cut and ranked by a device, which the host would keep waiting at every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .memory_model import DEVICE_BLOCK


@dataclass(frozen=True, eq=False)
class DeviceRows:
    """CSR of some rows, on their device. lengths: [rows] int64; column: [entries] int32; weight: [entries].

    dropped, mass: [rows] float64, the sum of the entries left out and of their absolute values, None where nothing was;
    magnitude: [rows] float64, the sum of the absolute values of all entries, None of rows that nothing is ranked by.
    """

    lengths: Tensor
    column: Tensor
    weight: Tensor
    dropped: Tensor | None = None
    mass: Tensor | None = None
    magnitude: Tensor | None = None


def packed(rows: Tensor, keep: int | None, ranked: bool = False) -> Iterator[DeviceRows]:
    """[rows, columns] some rows at a time: all entries but zeros, or the `keep` largest of each row."""
    together = DEVICE_BLOCK if keep is None else DEVICE_BLOCK // 2  # to cut takes twice the memory
    for block in rows.split(max(1, together // max(1, rows.shape[1]))):
        magnitude = _magnitude(block) if ranked else None
        yield pack(block, magnitude) if keep is None else cut(block, keep, magnitude)


def pack(block: Tensor, magnitude: Tensor | None) -> DeviceRows:
    """Every entry of [rows, columns] but zeros."""
    return DeviceRows(block.count_nonzero(1), *_entries(block, block), magnitude=magnitude)


def cut(block: Tensor, keep: int, magnitude: Tensor | None) -> DeviceRows:
    """The `keep` largest entries of each of [rows, columns]; of equal ones those in lower columns."""
    chosen = _largest(block.abs(), keep)
    left = block.masked_fill(chosen, 0)
    dropped, mass = left.sum(1, dtype=torch.float64), _magnitude(left)
    del left
    return DeviceRows(chosen.sum(1), *_entries(block, chosen), dropped, mass, magnitude)


def _largest(size: Tensor, keep: int) -> Tensor:
    """Where the `keep` largest of each row are, zeros left out: [rows, columns] bool; lower columns among equals."""
    cutoff = size.topk(min(max(keep, 1), size.shape[1]), sorted=False).values.amin(1, keepdim=True)
    above, equal = size > cutoff, (size == cutoff) & (size > 0)
    missing = keep - above.sum(1, keepdim=True)
    return above.logical_or_(equal.logical_and_(equal.cumsum(1, dtype=torch.int32) <= missing))


def _entries(block: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(column, weight) of entries of [rows, columns] where `chosen` is not zero. The host waits for their number."""
    place = chosen.reshape(-1).nonzero()[:, 0]
    weight = block.reshape(-1).index_select(0, place)
    return place.remainder_(block.shape[1]).to(torch.int32), weight


def _magnitude(block: Tensor) -> Tensor:
    """Float64 sums of absolute values: [rows]."""
    return torch.linalg.vector_norm(block, 1, dim=1, dtype=torch.float64)


class RankedRows:
    """Packed rows that a device keeps in order to rank features by them.

    starts: [layers + 1], where the features of each layer begin among the columns.
    """

    def __init__(self, like: Tensor, rows: int, entries: int, starts: list[int], columns: int) -> None:
        """Of so many rows and entries together, at the most."""
        self.columns, self.starts = columns, torch.tensor(starts[:-1], device=like.device)
        self.column, self.weight = like.new_empty(entries, dtype=torch.int32), like.new_empty(entries)
        self.lengths = like.new_empty(rows, dtype=torch.int64)
        self.magnitude = like.new_empty(rows, dtype=torch.float64)
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
        """Of every column, through the rows in `order` (outputs, then layers from the top): [columns] float64.

        What was cut off takes its share and hands nothing on.
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
    order: np.ndarray, layer: np.ndarray, lengths: np.ndarray, most: int = DEVICE_BLOCK
) -> Iterator[tuple[int, int, int, int]]:
    """(begin, end, first, last): order[begin:end] are rows of one layer, stored as entries first .. last of all rows.

    Rows of one layer hand nothing to one another. most: how many entries, unless a single row has more.
    """
    ends = lengths.cumsum()
    breaks = np.flatnonzero((np.diff(order) != 1) | (np.diff(layer) != 0)) + 1
    for begin, end in pairwise([0, *breaks.tolist(), len(order)]):
        while begin < end:
            row = order[begin]
            first = ends[row] - lengths[row]
            together = np.searchsorted(ends[row : row + end - begin], first + most, side="right")
            stop = begin + max(1, int(together))
            yield begin, stop, int(first), int(ends[row + stop - begin - 1])
            begin = stop
