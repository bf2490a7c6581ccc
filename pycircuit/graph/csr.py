"""Edge rows in compressed sparse row form (CSR): only stored entries, never nodes x nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycircuit.ops import checks

STEP = 1 << 16  # entries processed together: half a megabyte of float64 stays in the cache


def index_below(op: str, name: str, value: Any, count: int) -> int:
    """The value as an integer, once it is known to be from 0 to below `count`."""
    if not 0 <= checks.whole(op, name, value, -(2**63)) < count:
        raise ValueError(f"{op}: {name} must be below {count} and not negative, got {value}")
    return int(value)


@dataclass(frozen=True, eq=False)
class Block:
    """A batch of rows that have entries.

    rows: [n] row indices; lengths: [n] numbers of entries; slices: their entries, in the order of rows.
    """

    rows: np.ndarray
    lengths: np.ndarray
    slices: list[slice]

    def gather(self, entries: np.ndarray) -> np.ndarray:
        """Elements of an array of all entries that belong to these rows; a view where the rows are adjacent."""
        if len(self.slices) == 1:
            return entries[self.slices[0]]
        return np.concatenate([entries[chunk] for chunk in self.slices])

    def reduce(self, operation: np.ufunc, values: np.ndarray) -> np.ndarray:
        """Reduce the values of each row's entries to one: [n]."""
        return np.asarray(operation.reduceat(values, self.lengths.cumsum() - self.lengths))

    def repeat(self, values: np.ndarray) -> np.ndarray:
        """Repeat a value per row for each of the row's entries."""
        return np.repeat(values, self.lengths)


@dataclass(frozen=True, eq=False)
class Rows:
    """Edge rows: row r has the columns column[row_ptr[r] : row_ptr[r + 1]], ascending, and a weight for each.

    row_ptr: [rows + 1] int64; column: [entries] int32; weight: [entries] float32 or float64.
    """

    row_ptr: Tensor
    column: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        row_ptr, count, _ = checks.offsets("Graph", "rows.row_ptr", self.row_ptr)
        column = checks.tensor("Graph", "rows.column", self.column)
        checks.of_type("Graph", "rows.column", column, (torch.int32, torch.int64))
        weight = checks.floats("Graph", "rows.weight", self.weight, (1,), checks.WIDE)
        checks.shaped("Graph", "rows.column", column, (count,), "row_ptr's last entry")
        checks.shaped("Graph", "rows.weight", weight, (count,), "row_ptr's last entry")
        row_ptr, column, weight = row_ptr.cpu(), column.cpu(), weight.cpu().contiguous()
        checks.bounded("Graph", "rows.column", column, 0, 2**31, "from 0 to below 2^31")
        self._set_fields(row_ptr, column.to(torch.int32).contiguous(), weight)
        self._check_ascending()

    @classmethod
    def trusted(cls, row_ptr: Tensor, column: Tensor, weight: Tensor, finite: bool = False) -> Rows:
        """Make rows from tensors of the package's own making, without checks and without copies.

        The caller guarantees the invariants of __post_init__: row_ptr int64 from 0, never falling, to the number of
        entries; column int32, not negative, ascending within each row; weight float32 or float64; all contiguous on
        the CPU. Graph still checks that edges come from lower layers and that weights are finite. finite: the caller
        guarantees finite weights too; the first graph of these rows then skips that check.
        """
        rows = object.__new__(cls)
        rows._set_fields(row_ptr, column, weight)
        object.__setattr__(rows, "_finite", finite)
        return rows

    def known_finite(self) -> bool:
        """Return True once if the maker of these rows guarantees finite weights; anyone may change them after."""
        known: bool = getattr(self, "_finite", False)
        object.__setattr__(self, "_finite", False)
        return known

    def _set_fields(self, row_ptr: Tensor, column: Tensor, weight: Tensor) -> None:
        for name, value in (("row_ptr", row_ptr), ("column", column), ("weight", weight)):
            object.__setattr__(self, name, value)

    def _check_ascending(self) -> None:
        column, starts = self.column.numpy(), self.row_ptr.numpy()[:-1]
        for begin in range(0, len(column) - 1, STEP):
            falling = column[begin + 1 : begin + STEP + 1] <= column[begin : begin + STEP][: len(column) - 1 - begin]
            first, last = np.searchsorted(starts, (begin + 1, begin + len(falling) + 1))
            falling[starts[first:last] - 1 - begin] = False
            if falling.any():
                entry = begin + int(falling.argmax()) + 1
                raise ValueError(
                    "Graph: rows.column must ascend within each row, "
                    f"got {column[entry]} after {column[entry - 1]} at {entry}"
                )

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.row_ptr.numel() - 1

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.column.numel()

    def row(self, r: int) -> tuple[Tensor, Tensor]:
        """(columns, weights) of row r, as views."""
        r = index_below("Rows.row", "row", r, self.count)
        begin, end = int(self.row_ptr[r]), int(self.row_ptr[r + 1])
        return self.column[begin:end], self.weight[begin:end]

    def lengths(self) -> np.ndarray:
        """Number of entries of each row: [rows]."""
        return np.diff(self.row_ptr.numpy())

    def row_of_entry(self) -> np.ndarray:
        """Row of each entry: [entries] int32."""
        return np.repeat(np.arange(self.count, dtype=np.int32), self.lengths())

    def blocks(self, order: np.ndarray | None = None, step: int = STEP) -> Iterator[Block]:
        """Yield the rows in `order` (None: ascending) that have entries, about `step` entries at a time."""
        starts, row_lengths = self.row_ptr.numpy(), self.lengths()
        order = np.flatnonzero(row_lengths) if order is None else order[row_lengths[order] > 0]
        lengths = row_lengths[order]
        ends = lengths.cumsum()
        begin = 0
        while begin < len(order):
            before = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + step, side="right")))
            rows = order[begin:end]
            first, last = starts[rows], starts[rows + 1]
            breaks = first[1:] != last[:-1]
            bounds = zip([first[0], *first[1:][breaks]], [*last[:-1][breaks], last[-1]], strict=True)
            yield Block(rows, lengths[begin:end], [slice(a, b) for a, b in bounds])
            begin = end

    def sums(self, entries: np.ndarray) -> np.ndarray:
        """Float64 sums over each row of a value per entry: [rows]."""
        out = np.zeros(self.count)
        for block in self.blocks():
            out[block.rows] = block.reduce(np.add, block.gather(entries).astype(np.float64))
        return out

    def magnitudes(self) -> np.ndarray:
        """Absolute weight of every entry in float64: [entries]."""
        return np.abs(self.weight.numpy()).astype(np.float64)

    def masses(self) -> np.ndarray:
        """Float64 sums of |weight| over each row: [rows]."""
        out = np.zeros(self.count)
        weight = self.weight.numpy()
        for block in self.blocks():
            out[block.rows] = block.reduce(np.add, np.abs(block.gather(weight)).astype(np.float64))
        return out

    def select(self, entries: np.ndarray, rows: np.ndarray | None = None) -> Rows:
        """Select entries by a mask, [entries]. rows: mask of the rows to return, [rows], with every selected entry."""
        lengths = np.zeros(self.count, np.int64)
        for block in self.blocks():
            lengths[block.rows] = block.reduce(np.add, block.gather(entries).astype(np.int64))
        column, weight = compress(entries, self.column.numpy(), self.weight.numpy())
        return _packed(lengths if rows is None else lengths[rows], column, weight)

    @classmethod
    def from_dense(cls, matrix: Any, keep: int | None = None) -> tuple[Rows, Tensor, Tensor]:
        """Compress a matrix [rows, columns] to (rows, dropped, dropped_mass).

        keep: entries kept of each row, the largest; None: all but zeros. Of equal entries those in lower columns stay.
        dropped, dropped_mass: [rows] float64, the sum of the other entries and of their absolute values.
        """
        dense = checks.floats("Rows.from_dense", "matrix", matrix, (2,), checks.WIDE).cpu().numpy()
        keep = dense.shape[1] if keep is None else checks.whole("Rows.from_dense", "keep", keep, 0)
        dropped, mass = np.zeros(len(dense)), np.zeros(len(dense))
        lengths = np.array([min(keep, np.count_nonzero(row != 0)) for row in dense], np.int64)
        column, weight = np.empty(lengths.sum(), np.int32), np.empty(lengths.sum(), dense.dtype)
        for r, (row, end) in enumerate(zip(dense, lengths.cumsum().tolist(), strict=True)):
            columns = np.flatnonzero(row != 0)
            entries = row.take(columns)
            if keep < len(columns):
                chosen = largest(np.abs(entries), keep)
                omitted = entries.astype(np.float64)
                omitted[chosen] = 0
                dropped[r], mass[r] = omitted.sum(), np.abs(omitted).sum()
                columns, entries = columns[chosen], entries[chosen]
            into = slice(end - lengths[r], end)
            column[into], weight[into] = columns, entries
        return _packed(lengths, column, weight), torch.from_numpy(dropped), torch.from_numpy(mass)


def _packed(lengths: np.ndarray, column: np.ndarray, weight: np.ndarray) -> Rows:
    row_ptr = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    return Rows.trusted(torch.from_numpy(row_ptr), torch.from_numpy(column), torch.from_numpy(weight))


def largest(size: np.ndarray, keep: int) -> np.ndarray:
    """Columns of the `keep` largest of size, [columns], ascending; lower columns first among equals."""
    if keep == 0:
        return np.zeros(0, np.int64)
    cutoff = np.partition(size, len(size) - keep)[len(size) - keep]
    selected = size > cutoff
    equal = np.flatnonzero(~(selected | (size < cutoff)))  # and NaN, so that there are always enough
    selected[equal[: keep - np.count_nonzero(selected)]] = True
    return np.flatnonzero(selected)


def compress(mask: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """Select array[mask] of each array, without an index for every entry at once."""
    count = np.count_nonzero(mask)
    out = [np.empty(count, array.dtype) for array in arrays]
    offset = 0
    for begin in range(0, len(mask), STEP):
        selected = np.flatnonzero(mask[begin : begin + STEP])
        for array, into in zip(arrays, out, strict=True):
            array[begin : begin + STEP].take(selected, out=into[offset : offset + len(selected)], mode="clip")
        offset += len(selected)
    return out
