"""Edge rows as CSR: only the entries that are there, never nodes x nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycircuit.ops import checks

STEP = 1 << 16  # entries looked at together: half a megabyte of float64 stays in the cache


def below(op: str, name: str, value: Any, count: int) -> int:
    """A whole number from 0 to below `count`."""
    if not 0 <= checks.whole_number(op, name, value, -(2**63)) < count:
        raise ValueError(f"{op}: {name} must be below {count} and not negative, got {value}")
    return int(value)


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows that have entries. rows: [n] their numbers; lengths: [n] how many entries; parts: where they lie."""

    rows: np.ndarray
    lengths: np.ndarray
    parts: list[slice]

    def take(self, entries: np.ndarray) -> np.ndarray:
        """What an array of all entries holds for these rows, row after row; a view where they are adjacent."""
        if len(self.parts) == 1:
            return entries[self.parts[0]]
        return np.concatenate([entries[part] for part in self.parts])

    def reduce(self, operation: np.ufunc, taken: np.ndarray) -> np.ndarray:
        """Each row's entries brought together: [n]."""
        return np.asarray(operation.reduceat(taken, self.lengths.cumsum() - self.lengths))

    def repeat(self, values: np.ndarray) -> np.ndarray:
        """A value per row, for each of its entries."""
        return np.repeat(values, self.lengths)


@dataclass(frozen=True, eq=False)
class Rows:
    """Row r holds column[row_ptr[r] : row_ptr[r + 1]], ascending, and the weight of each.

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
        self._hold(row_ptr, column.to(torch.int32).contiguous(), weight)
        self._ascending()

    @classmethod
    def trusted(cls, row_ptr: Tensor, column: Tensor, weight: Tensor, finite: bool = False) -> Rows:
        """Rows of tensors that our own code made, taken as they are: no entry is looked at, nothing is copied.

        The caller answers for what __post_init__ checks: row_ptr int64 from 0, never falling, to the number of
        entries; column int32, not negative, ascending within each row; weight float32 or float64; all contiguous on
        the CPU. Graph still sees to it that edges come from lower layers, and that weights are finite, unless the
        caller answers for that too: finite, which holds for the first graph of these rows.
        """
        rows = object.__new__(cls)
        rows._hold(row_ptr, column, weight)
        object.__setattr__(rows, "_finite", finite)
        return rows

    def known_finite(self) -> bool:
        """Whether the maker of these rows answers for finite weights: True once, since anyone may change them after."""
        known: bool = getattr(self, "_finite", False)
        object.__setattr__(self, "_finite", False)
        return known

    def _hold(self, row_ptr: Tensor, column: Tensor, weight: Tensor) -> None:
        for name, value in (("row_ptr", row_ptr), ("column", column), ("weight", weight)):
            object.__setattr__(self, name, value)

    def _ascending(self) -> None:
        column, starts = self.column.numpy(), self.row_ptr.numpy()[:-1]
        for begin in range(0, len(column) - 1, STEP):
            falls = column[begin + 1 : begin + STEP + 1] <= column[begin : begin + STEP][: len(column) - 1 - begin]
            first, last = np.searchsorted(starts, (begin + 1, begin + len(falls) + 1))
            falls[starts[first:last] - 1 - begin] = False
            if falls.any():
                at = begin + int(falls.argmax()) + 1
                raise ValueError(
                    f"Graph: rows.column must ascend within each row, got {column[at]} after {column[at - 1]} at {at}"
                )

    @property
    def count(self) -> int:
        return self.row_ptr.numel() - 1

    @property
    def entries(self) -> int:
        return self.column.numel()

    def row(self, r: int) -> tuple[Tensor, Tensor]:
        """(columns, weights) of row r, as views."""
        r = below("Rows.row", "row", r, self.count)
        begin, end = int(self.row_ptr[r]), int(self.row_ptr[r + 1])
        return self.column[begin:end], self.weight[begin:end]

    def lengths(self) -> np.ndarray:
        return np.diff(self.row_ptr.numpy())

    def row_of_entry(self) -> np.ndarray:
        """[entries] int32: which row each entry belongs to."""
        return np.repeat(np.arange(self.count, dtype=np.int32), self.lengths())

    def blocks(self, order: np.ndarray | None = None, step: int = STEP) -> Iterator[Block]:
        """The rows in `order` (all, one after the other) that have entries, about `step` entries at a time."""
        starts, every = self.row_ptr.numpy(), self.lengths()
        order = np.flatnonzero(every) if order is None else order[every[order] > 0]
        lengths = every[order]
        ends, begin = lengths.cumsum(), 0
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
        """Float64 sum of a value per entry over each row: [rows]."""
        out = np.zeros(self.count)
        for block in self.blocks():
            out[block.rows] = block.reduce(np.add, block.take(entries).astype(np.float64))
        return out

    def magnitudes(self) -> np.ndarray:
        """|weight| of every entry in float64: [entries]."""
        return np.abs(self.weight.numpy()).astype(np.float64)

    def masses(self) -> np.ndarray:
        """Float64 sum of |weight| over each row: [rows]."""
        out, weight = np.zeros(self.count), self.weight.numpy()
        for block in self.blocks():
            out[block.rows] = block.reduce(np.add, np.abs(block.take(weight)).astype(np.float64))
        return out

    def select(self, entries: np.ndarray, rows: np.ndarray | None = None) -> Rows:
        """Only the chosen entries, a mask; all rows, or those of a mask outside which no entry is chosen."""
        lengths = np.zeros(self.count, np.int64)
        for block in self.blocks():
            lengths[block.rows] = block.reduce(np.add, block.take(entries).astype(np.int64))
        column, weight = compress(entries, self.column.numpy(), self.weight.numpy())
        return _packed(lengths if rows is None else lengths[rows], column, weight)

    @classmethod
    def from_dense(cls, matrix: Any, keep: int | None = None) -> tuple[Rows, Tensor, Tensor]:
        """(rows, dropped, dropped_mass) of [rows, columns]: every entry but zeros, or the `keep` largest of each row.

        dropped and dropped_mass: [rows] float64, the sum of what was left out and of its absolute values.
        Of entries of equal size those in lower columns stay.
        """
        dense = checks.floats("Rows.from_dense", "matrix", matrix, (2,), checks.WIDE).cpu().numpy()
        keep = dense.shape[1] if keep is None else checks.whole_number("Rows.from_dense", "keep", keep, 0)
        dropped, mass = np.zeros(len(dense)), np.zeros(len(dense))
        lengths = np.array([min(keep, np.count_nonzero(row != 0)) for row in dense], np.int64)
        column, weight = np.empty(lengths.sum(), np.int32), np.empty(lengths.sum(), dense.dtype)
        for r, (row, end) in enumerate(zip(dense, lengths.cumsum().tolist(), strict=True)):
            filled = np.flatnonzero(row != 0)
            entries = row.take(filled)
            if keep < len(filled):
                chosen = largest(np.abs(entries), keep)
                left = entries.astype(np.float64)
                left[chosen] = 0
                dropped[r], mass[r] = left.sum(), np.abs(left).sum()
                filled, entries = filled[chosen], entries[chosen]
            into = slice(end - lengths[r], end)
            column[into], weight[into] = filled, entries
        return _packed(lengths, column, weight), torch.from_numpy(dropped), torch.from_numpy(mass)


def _packed(lengths: np.ndarray, column: np.ndarray, weight: np.ndarray) -> Rows:
    row_ptr = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    return Rows.trusted(torch.from_numpy(row_ptr), torch.from_numpy(column), torch.from_numpy(weight))


def largest(size: np.ndarray, keep: int) -> np.ndarray:
    """Where the `keep` largest of size, [columns], are, ascending; lower columns first among equals."""
    if keep == 0:
        return np.zeros(0, np.int64)
    cutoff = np.partition(size, len(size) - keep)[len(size) - keep]
    above = size > cutoff
    equal = np.flatnonzero(~(above | (size < cutoff)))  # and NaN, so that there are always enough
    above[equal[: keep - np.count_nonzero(above)]] = True
    return np.flatnonzero(above)


def compress(mask: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """array[mask] of each, without an index for every entry at once."""
    out, at = [np.empty(np.count_nonzero(mask), array.dtype) for array in arrays], 0
    for begin in range(0, len(mask), STEP):
        chosen = np.flatnonzero(mask[begin : begin + STEP])
        for array, into in zip(arrays, out, strict=True):
            array[begin : begin + STEP].take(chosen, out=into[at : at + len(chosen)], mode="clip")
        at += len(chosen)
    return out
