"""The edge rows of a trace while it runs: dense while they fit, packed to their cones, or cut to their largest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.graph import Rows

from .columns import Columns
from .memory_model import PACK_BLOCK


class Part:
    """CSR of some rows. lengths: [rows] int64; column: [entries] int32; weight: [entries]; all NumPy.

    dropped, mass: [rows] float64, the sum of the entries left out and of their absolute values.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        column: np.ndarray,
        weight: np.ndarray,
        dropped: np.ndarray | None = None,
        mass: np.ndarray | None = None,
    ) -> None:
        self.lengths, self.column, self.weight = lengths, column, weight
        self.dropped = np.zeros(len(lengths)) if dropped is None else dropped
        self.mass = np.zeros(len(lengths)) if mass is None else mass

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self) -> Rows:
        ptr = np.concatenate([np.zeros(1, np.int64), self.lengths.cumsum()])
        return Rows(torch.from_numpy(ptr), torch.from_numpy(self.column), torch.from_numpy(self.weight))

    @classmethod
    def of_cones(cls, block: Tensor, columns: Columns, layer: Sequence[int], position: Sequence[int]) -> Part:
        """What rows of a block [rows, columns] hold in their cones, zeros left out, a few rows at a time."""
        flat, iota = block.cpu().numpy(), np.arange(columns.count, dtype=np.int32)
        cones = [columns.cone(at, p) for at, p in zip(layer, position, strict=True)]
        lengths = np.array(
            [sum(np.count_nonzero(row[a:b]) for a, b in cone) for row, cone in zip(flat, cones, strict=True)], np.int64
        )
        column, weight = np.empty(lengths.sum(), np.int32), np.empty(lengths.sum(), flat.dtype)
        step, end = max(1, PACK_BLOCK // max(1, columns.count)), 0
        for begin in range(0, len(flat), step):
            rows = list(zip(flat[begin : begin + step], cones[begin : begin + step], strict=True))
            entries = np.concatenate([row[a:b] for row, cone in rows for a, b in cone])
            sources = np.concatenate([iota[a:b] for _, cone in rows for a, b in cone])
            start, end = end, end + int(lengths[begin : begin + step].sum())
            filled = slice(None) if end - start == len(entries) else entries != 0
            column[start:end], weight[start:end] = sources[filled], entries[filled]
        return cls(lengths, column, weight)

    @classmethod
    def of_largest(cls, block: Tensor, keep: int) -> Part:
        """The `keep` largest entries of every row of a block, a few rows at a time."""
        lengths = np.array([min(keep, np.count_nonzero(row)) for row in block.cpu().numpy()], np.int64)
        column, weight = np.empty(lengths.sum(), np.int32), np.empty(lengths.sum(), block.cpu().numpy().dtype)
        dropped, mass, end = np.empty(len(block)), np.empty(len(block)), 0
        step = max(1, PACK_BLOCK // max(1, block.shape[1]))
        for begin in range(0, len(block), step):
            rows, left_out, left_mass = Rows.from_dense(block[begin : begin + step].cpu(), keep)
            start, end = end, end + rows.entries
            column[start:end], weight[start:end] = rows.column.numpy(), rows.weight.numpy()
            dropped[begin : begin + step], mass[begin : begin + step] = left_out.numpy(), left_mass.numpy()
        return cls(lengths, column, weight, dropped, mass)


class _Growing:
    """An array appended to in place; `most` entries are reserved, of which memory holds those that were written."""

    def __init__(self, dtype: np.dtype | type, most: int) -> None:
        self.held, self.size = np.empty(most, dtype), 0

    def append(self, values: np.ndarray) -> None:
        size = self.size + len(values)
        if size > len(self.held):
            self.held.resize(size, refcheck=False)
        self.held[self.size : size] = values
        self.size = size

    def __call__(self) -> np.ndarray:
        """What is in it: a view, good until the next append."""
        return self.held[: self.size]

    def finish(self, size: int) -> np.ndarray:
        """The first `size` of it, and no more memory than they take."""
        self.held.resize(size, refcheck=False)
        return self.held


class Store:
    """Edge rows of a trace as it finds them, and the influence that runs through them.

    dense: keep them as the sweep writes them, too, [rows, columns], so that ranking reads at the speed of memory.
    keep: cut every row to so many entries; None for all of them.
    """

    def __init__(
        self, columns: Columns, like: Tensor, rows: int, dense: bool, keep: int | None, entries: int = 0
    ) -> None:
        """entries: of all rows together, at the most."""
        self.columns, self.like, self.keep = columns, like, keep
        self.block = like.new_zeros(rows, columns.count) if dense else None
        self._tile = like.new_empty(0)
        self.count = 0
        kind = np.float64 if like.dtype == torch.float64 else np.float32
        self._column, self._weight = _Growing(np.int32, entries), _Growing(kind, entries)
        self._lengths, self._dropped, self._mass = (_Growing(t, rows) for t in (np.int64, np.float64, np.float64))

    def room(self, count: int) -> Tensor:
        """[count, columns] zeros to add edges to."""
        if self.block is not None:
            return self.block[self.count : self.count + count]
        size = count * self.columns.count
        if self._tile.numel() < size:
            self._tile = self._tile[:0].clone()  # before the larger one is there
            self._tile = self.like.new_empty(size)
        return self._tile[:size].view(count, -1).zero_()

    def pack(self, filled: Tensor, layer: Sequence[int], position: Sequence[int]) -> Part:
        """The entries of rows in a room, of targets reading there."""
        if self.keep is not None and self.keep < self.columns.count:
            return Part.of_largest(filled, self.keep)
        return Part.of_cones(filled, self.columns, layer, position)

    def take(self, part: Part) -> None:
        """Keep these rows; in a dense store they lie in its next room already (see `restore`)."""
        self._column.append(part.column)
        self._weight.append(part.weight)
        self._dropped.append(part.dropped)
        self._mass.append(part.mass)
        self._lengths.append(part.lengths)
        self.count += len(part)

    def restore(self, part: Part) -> None:
        """Keep rows that come from elsewhere."""
        if self.block is not None:
            ends = part.lengths.cumsum()
            for row, begin, end in zip(self.room(len(part)), ends - part.lengths, ends, strict=True):
                column, weight = (torch.from_numpy(a[begin:end]).to(self.like.device) for a in (part.column, part.weight))
                row[column.long()] = weight
        self.take(part)

    def influence(self, order: Tensor, node: Tensor, weight: Tensor) -> Tensor:
        """Of every column, through the rows in `order` (outputs, then layers from the top): [columns] on the device."""
        if self.block is not None:
            return ops.influence(self.block, node, weight, order)
        return torch.from_numpy(self._packed_influence(order.numpy(), node.numpy(), weight.numpy())).to(self.like)

    def _packed_influence(self, order: np.ndarray, node: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The same from packed rows; what was cut off takes its share and hands nothing on."""
        ends = self._lengths().cumsum()
        column, size, total = self._column(), self._weight(), np.zeros(self.columns.count)
        for r, n, entering in zip(order, node, weight, strict=True):
            at = slice(ends[r] - self._lengths()[r], ends[r])
            entering = entering + (total[n] if n >= 0 else 0.0)
            share = np.abs(size[at])
            mass = share.sum(dtype=np.float64) + self._mass()[r]
            if entering and mass:
                total[column[at]] += share * (entering / mass)
        return total

    def finish(self) -> Part:
        """All rows; the store is empty after. Where an interrupt came in the middle of `take`, those before it."""
        self.block, self._tile = None, self._tile[:0]
        lengths = self._lengths.finish(self.count)
        entries = (g.finish(int(lengths.sum())) for g in (self._column, self._weight))
        return Part(lengths, *entries, *(g.finish(self.count) for g in (self._dropped, self._mass)))
