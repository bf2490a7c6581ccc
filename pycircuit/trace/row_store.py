"""The edge rows of a trace while it runs: dense while they fit, packed to their cones, or cut to their largest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.graph import Rows

from .columns import Columns
from .memory_model import PACK_BLOCK


class Growing:
    """An array appended to in place; `most` entries are reserved, of which memory holds those that were written."""

    def __init__(self, dtype: np.dtype | type, most: int) -> None:
        self.held, self.size = np.empty(most, dtype), 0

    def append(self, values: np.ndarray) -> None:
        begin = self.extend(len(values))
        self.held[begin : self.size] = values

    def extend(self, count: int) -> int:
        """Make place for so many entries, which the caller writes; returns where they begin."""
        begin, self.size = self.size, self.size + count
        if self.size > len(self.held):
            self.held.resize(self.size, refcheck=False)
        return begin

    def __call__(self) -> np.ndarray:
        """What is in it: a view, good until the next append."""
        return self.held[: self.size]

    def finish(self, size: int) -> np.ndarray:
        """The first `size` of it, and no more memory than they take."""
        self.held.resize(size, refcheck=False)
        return self.held


def cone_entries(
    block: np.ndarray, columns: Columns, layer: Sequence[int], position: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(entries of each row, their columns, their weights) of some rows of a block at a time, zeros left out."""
    iota, step = np.arange(columns.count, dtype=np.int32), max(1, PACK_BLOCK // max(1, columns.count))
    for begin in range(0, len(layer), step):
        places = zip(layer[begin : begin + step], position[begin : begin + step], strict=True)
        cones = [columns.cone(at, p) for at, p in places]
        lengths = np.array([sum(end - first for first, end in cone) for cone in cones], np.int64)
        rows = block[begin : begin + len(cones)]  # an interrupted block has more
        weight = np.concatenate([row[a:b] for row, cone in zip(rows, cones, strict=True) for a, b in cone])
        column = np.concatenate([iota[a:b] for cone in cones for a, b in cone])
        filled = weight != 0
        if not filled.all():
            starts = lengths.cumsum() - lengths
            lengths = np.add.reduceat(filled, starts, dtype=np.int64)
            column, weight = column[filled], weight[filled]
        yield lengths, column, weight


class Part:
    """CSR of some rows. lengths: [rows] int64; column: [entries] int32; weight: [entries]; all NumPy.

    dropped, mass: [rows] float64, the sum of the entries left out and of their absolute values. trusted: this very run
    packed all of them, from edges that it found finite.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        column: np.ndarray,
        weight: np.ndarray,
        dropped: np.ndarray | None = None,
        mass: np.ndarray | None = None,
        trusted: bool = False,
    ) -> None:
        self.lengths, self.column, self.weight = lengths, column, weight
        self.dropped = np.zeros(len(lengths)) if dropped is None else dropped
        self.mass = np.zeros(len(lengths)) if mass is None else mass
        self.trusted = trusted

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self) -> Rows:
        ptr = np.concatenate([np.zeros(1, np.int64), self.lengths.cumsum()])
        parts = torch.from_numpy(ptr), torch.from_numpy(self.column), torch.from_numpy(self.weight)
        return Rows.trusted(*parts, finite=True) if self.trusted else Rows(*parts)

    @classmethod
    def of_cones(cls, block: Tensor, columns: Columns, layer: Sequence[int], position: Sequence[int]) -> Part:
        """What rows of a block [rows, columns] hold in their cones, zeros left out, a few rows at a time."""
        most = int(columns.cone_sizes(*(torch.tensor(places, device="cpu") for places in (layer, position))).sum())
        array = block.numpy()
        lengths, column, weight = np.empty(0, np.int64), Growing(np.int32, most), Growing(array.dtype, most)
        for counts, sources, entries in cone_entries(array, columns, layer, position):
            lengths = np.concatenate([lengths, counts])
            column.append(sources)
            weight.append(entries)
        return cls(lengths, column.finish(column.size), weight.finish(weight.size))

    @classmethod
    def of_largest(cls, block: Tensor, keep: int) -> Part:
        """The `keep` largest entries of every row of a block, a few rows at a time."""
        lengths = np.array([min(keep, np.count_nonzero(row)) for row in block.numpy()], np.int64)
        column, weight = np.empty(lengths.sum(), np.int32), np.empty(lengths.sum(), block.numpy().dtype)
        dropped, mass, end = np.empty(len(block)), np.empty(len(block)), 0
        step = max(1, PACK_BLOCK // max(1, block.shape[1]))
        for begin in range(0, len(block), step):
            rows, left_out, left_mass = Rows.from_dense(block[begin : begin + step], keep)
            start, end = end, end + rows.entries
            column[start:end], weight[start:end] = rows.column.numpy(), rows.weight.numpy()
            dropped[begin : begin + step], mass[begin : begin + step] = left_out.numpy(), left_mass.numpy()
        return cls(lengths, column, weight, dropped, mass)


class Store:
    """Edge rows of a trace as it finds them, and the influence that runs through them.

    dense: keep them as the sweep writes them, [rows, columns], so that ranking reads at the speed of memory; they are
    packed where they lie when all are there. keep: cut every row to so many entries; None for all of them.
    """

    def __init__(
        self,
        columns: Columns,
        like: Tensor,
        rows: int,
        dense: bool,
        keep: int | None,
        entries: int = 0,
        targets: int = 0,
    ) -> None:
        """entries: of all rows together, at the most; targets: of a tile, at the most."""
        self.columns, self.like, self.keep, self.dense, self.targets = columns, like, keep, dense, targets
        kind = np.float64 if like.dtype == torch.float64 else np.float32
        in_place = dense and not like.is_cuda
        self._memory = np.zeros(rows * columns.count if in_place else 0, kind)
        self.block: Tensor | None = None
        if dense:
            on_device = like.new_zeros(rows * columns.count) if like.is_cuda else torch.from_numpy(self._memory)
            self.block = on_device.view(rows, columns.count)
        self._tile = like.new_empty(0)
        self.count = 0
        self._places: tuple[list[int], list[int]] = [], []  # layers and positions of dense rows
        self._column, self._weight = Growing(np.int32, entries), Growing(kind, 0 if in_place else entries)
        self._lengths, self._dropped, self._mass = (Growing(t, rows) for t in (np.int64, np.float64, np.float64))
        self._trusted = True  # until rows come from elsewhere

    def room(self, count: int) -> Tensor:
        """[count, columns] zeros to add edges to."""
        if self.block is not None:
            return self.block[self.count : self.count + count]
        size = count * self.columns.count
        if self._tile.numel() < size:
            self.release()
            self._tile = self.like.new_empty(max(count, self.targets) * self.columns.count)
        return self._tile[:size].view(count, -1).zero_()

    def pack(self, filled: Tensor, layer: Sequence[int], position: Sequence[int]) -> Part:
        """The entries of rows in a room, of targets reading there."""
        if self.keep is not None and self.keep < self.columns.count:
            return Part.of_largest(filled, self.keep)
        return Part.of_cones(filled, self.columns, layer, position)

    def add(self, filled: Tensor, layer: Sequence[int], position: Sequence[int], part: Part | None = None) -> None:
        """Keep rows that were written to a room, of targets reading there. part: the same rows, if packed already."""
        if self.dense:
            self.settle(layer, position)
        else:
            self.take(self.pack(filled, layer, position) if part is None else part)

    def settle(self, layer: Sequence[int], position: Sequence[int]) -> None:
        """Keep rows that were written to a dense store's room, of targets reading there."""
        for places, more in zip(self._places, (layer, position), strict=True):
            places[self.count :] = more
        self.count += len(layer)

    def export_settled(self) -> None:
        """Bring settled rows to the host, while a device works on what was launched after them."""

    def take(self, part: Part) -> None:
        """Keep packed rows."""
        self._column.append(part.column)
        self._weight.append(part.weight)
        self._dropped.append(part.dropped)
        self._mass.append(part.mass)
        self._lengths.append(part.lengths)
        self.count += len(part)

    def restore(self, part: Part, layer: Sequence[int], position: Sequence[int]) -> None:
        """Keep packed rows that come from elsewhere, of targets reading there."""
        self._trusted = False
        if self.block is None:
            self.take(part)
        else:
            ends = part.lengths.cumsum()
            for row, begin, end in zip(self.room(len(part)), ends - part.lengths, ends, strict=True):
                column, weight = (
                    torch.from_numpy(a[begin:end]).to(self.like.device) for a in (part.column, part.weight)
                )
                row[column.long()] = weight
            self.settle(layer, position)

    def influence(self, order: Tensor, node: Tensor, weight: Tensor) -> Tensor:
        """Of every column, through the rows in `order` (outputs, then layers from the top): [columns] on the device."""
        if self.block is not None:
            return ops.influence(self.block, node, weight, order)
        total = self._packed_influence(*(t.cpu().numpy() for t in (order, node, weight)))
        return torch.from_numpy(total).to(self.like)

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
        if self.block is not None:
            self._pack_block()
        lengths = self._lengths.finish(self.count)
        column, weight = (g.finish(int(lengths.sum())) for g in (self._column, self._weight))
        dropped, mass = (g.finish(self.count) for g in (self._dropped, self._mass))
        return Part(lengths, column, weight, dropped, mass, self._trusted)

    def release(self) -> None:
        """Give back what rows were written to before they were packed."""
        self._tile = self._tile[:0].clone()

    def _pack_block(self) -> None:
        """Move the entries of dense rows together, each before the place where it was, so that no copy is needed."""
        assert self.block is not None
        array, end = self.block.numpy(), 0
        flat = array.reshape(-1)
        layer, position = (places[: self.count] for places in self._places)
        for lengths, column, weight in cone_entries(array, self.columns, layer, position):
            flat[end : end + len(weight)] = weight
            end += len(weight)
            self._column.append(column)
            self._lengths.append(lengths)
        self._weight.held = self._memory
        self._memory, self.block = self._memory[:0].copy(), None
        for sums in (self._dropped, self._mass):
            sums.append(np.zeros(self.count))
