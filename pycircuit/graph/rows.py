"""Edge rows as CSR: only the entries that are there, never nodes x nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycircuit.ops import checks


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
        object.__setattr__(self, "row_ptr", row_ptr)
        object.__setattr__(self, "column", column.to(torch.int32).contiguous())
        object.__setattr__(self, "weight", weight)
        self._ascending()

    def _ascending(self) -> None:
        column, starts = self.column.numpy(), self.row_ptr.numpy()
        falls = column[1:] <= column[:-1]
        ends = starts[1:-1]
        falls[ends[(ends > 0) & (ends < len(column))] - 1] = False
        if falls.any():
            at = int(falls.argmax()) + 1
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
        begin, end = int(self.row_ptr[r]), int(self.row_ptr[r + 1])
        return self.column[begin:end], self.weight[begin:end]

    def lengths(self) -> np.ndarray:
        return np.diff(self.row_ptr.numpy())

    def row_of_entry(self) -> np.ndarray:
        """[entries] int32: which row each entry belongs to."""
        return np.repeat(np.arange(self.count, dtype=np.int32), self.lengths())

    def sums(self, entries: np.ndarray) -> np.ndarray:
        """Float64 sum of a value per entry over each row: [rows]."""
        starts, out = self.row_ptr.numpy(), np.zeros(self.count)
        filled = starts[1:] > starts[:-1]
        if filled.any():
            out[filled] = np.add.reduceat(entries, starts[:-1][filled], dtype=np.float64)
        return out

    def magnitudes(self, keep: np.ndarray | None = None) -> np.ndarray:
        """|weight| of every entry in float64: [entries], zero where `keep` is false."""
        size = np.abs(self.weight.numpy()).astype(np.float64)
        return size if keep is None else size * keep

    def select(self, rows: np.ndarray, entries: np.ndarray) -> Rows:
        """Only the chosen rows and, of those, the chosen entries; both masks."""
        entries = entries & np.repeat(rows, self.lengths())
        lengths = np.rint(self.sums(entries)).astype(np.int64)[rows]
        kept = torch.from_numpy(entries)
        pointers = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
        return Rows(pointers, self.column[kept], self.weight[kept])

    @classmethod
    def from_dense(cls, matrix: Any, keep: int | None = None) -> tuple[Rows, Tensor, Tensor]:
        """(rows, dropped, dropped_mass) of [rows, columns]: every entry but zeros, or the `keep` largest of each row.

        dropped and dropped_mass: [rows] float64, the sum of what was left out and of its absolute values.
        Of entries of equal size those in lower columns stay.
        """
        dense = checks.floats("Rows.from_dense", "matrix", matrix, (2,), checks.WIDE).cpu()
        kept = dense != 0
        if keep is not None and keep < dense.shape[1]:
            kept &= largest(dense.abs(), checks.whole("Rows.from_dense", "keep", keep, 0))
        row_ptr = torch.zeros(len(dense) + 1, dtype=torch.int64)
        row_ptr[1:] = kept.sum(1).cumsum(0)
        left = dense.masked_fill(kept, 0)
        rows = cls(row_ptr, kept.nonzero()[:, 1], dense[kept])
        return rows, left.sum(1, dtype=torch.float64), left.abs().sum(1, dtype=torch.float64)


def largest(size: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest entries of each row of size [rows, columns]; lower columns first among equals."""
    if keep == 0:
        return torch.zeros_like(size, dtype=torch.bool)
    cutoff = size.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = size > cutoff, size == cutoff
    return above | (equal & (equal.cumsum(1) <= keep - above.sum(1, keepdim=True)))
