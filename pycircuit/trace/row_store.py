"""Edge rows of a trace while it runs: dense while they fit, packed to their cones, or cut to their largest entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.graph import Rows

from .columns import Columns
from .memory_model import PACK_BLOCK


class GrowableArray:
    """An array that is appended to in place.

    Space for `capacity` entries is reserved; the system gives memory to those that were written. size: entries written.
    """

    def __init__(self, dtype: np.dtype | type, capacity: int) -> None:
        self.array = np.empty(capacity, dtype)
        self.size = 0

    def append(self, values: np.ndarray) -> None:
        begin = self.extend(len(values))
        self.array[begin : self.size] = values

    def extend(self, count: int) -> int:
        """Add entries that the caller writes; return where they begin."""
        begin = self.size
        self.size += count
        if self.size > len(self.array):
            self.array.resize(self.size, refcheck=False)
        return begin

    def view(self) -> np.ndarray:
        """Return the entries written so far, as a view that is good until the next append."""
        return self.array[: self.size]

    def finish(self, size: int) -> np.ndarray:
        """Return the first `size` entries, in no more memory than they take."""
        self.array.resize(size, refcheck=False)
        return self.array


def cone_entries(
    block: np.ndarray, columns: Columns, layer: Sequence[int], position: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (entries of each row, their columns, their weights), zeros left out, a few rows of a block at a time."""
    iota = np.arange(columns.count, dtype=np.int32)
    step = max(1, PACK_BLOCK // max(1, columns.count))
    cone_of = cache(columns.cone)
    for begin in range(0, len(layer), step):
        cones = list(map(cone_of, layer[begin : begin + step], position[begin : begin + step]))
        lengths = np.array([sum(end - first for first, end in cone) for cone in cones], np.int64)
        rows = block[begin : begin + len(cones)]  # an interrupted block has more
        weight = np.concatenate([row[a:b] for row, cone in zip(rows, cones, strict=True) for a, b in cone])
        column = np.concatenate([iota[a:b] for cone in cones for a, b in cone])
        nonzero = weight != 0
        if not nonzero.all():
            starts = lengths.cumsum() - lengths
            lengths = np.add.reduceat(nonzero, starts, dtype=np.int64)
            column, weight = column[nonzero], weight[nonzero]
        yield lengths, column, weight


class PackedRows:
    """Edge rows as CSR, in NumPy arrays. lengths: [rows] int64; column: [entries] int32; weight: [entries].

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

    def to_rows(self) -> Rows:
        """Return them as a graph holds them."""
        row_ptr = np.concatenate([np.zeros(1, np.int64), self.lengths.cumsum()])
        csr = torch.from_numpy(row_ptr), torch.from_numpy(self.column), torch.from_numpy(self.weight)
        return Rows.trusted(*csr, finite=True) if self.trusted else Rows(*csr)

    @classmethod
    def from_cones(cls, block: Tensor, columns: Columns, layer: Sequence[int], position: Sequence[int]) -> PackedRows:
        """Pack the entries of a block [rows, columns] that lie in the rows' cones, zeros left out."""
        reads = (torch.tensor(numbers, device="cpu") for numbers in (layer, position))
        capacity = int(columns.cone_sizes(*reads).sum())
        array = block.numpy()
        lengths = np.empty(0, np.int64)
        column, weight = GrowableArray(np.int32, capacity), GrowableArray(array.dtype, capacity)
        for block_lengths, block_column, block_weight in cone_entries(array, columns, layer, position):
            lengths = np.concatenate([lengths, block_lengths])
            column.append(block_column)
            weight.append(block_weight)
        return cls(lengths, column.finish(column.size), weight.finish(weight.size))

    @classmethod
    def from_largest(cls, block: Tensor, keep: int) -> PackedRows:
        """Pack the `keep` largest entries of every row of a block [rows, columns]."""
        lengths = np.array([min(keep, np.count_nonzero(row)) for row in block.numpy()], np.int64)
        column = np.empty(lengths.sum(), np.int32)
        weight = np.empty(lengths.sum(), block.numpy().dtype)
        dropped, mass = np.empty(len(block)), np.empty(len(block))
        end = 0
        step = max(1, PACK_BLOCK // max(1, block.shape[1]))
        for begin in range(0, len(block), step):
            rows, block_dropped, block_mass = Rows.from_dense(block[begin : begin + step], keep)
            start, end = end, end + rows.entries
            column[start:end] = rows.column.numpy()
            weight[start:end] = rows.weight.numpy()
            dropped[begin : begin + step] = block_dropped.numpy()
            mass[begin : begin + step] = block_mass.numpy()
        return cls(lengths, column, weight, dropped, mass)


@dataclass(frozen=True)
class StoreSize:
    """Size of a store of edge rows.

    rows, entries: of the whole trace, at the most; tile_targets: of a tile, at the most.
    dense: rows stay as the sweep writes them, [rows, columns], so that ranking reads at the speed of memory; they are
    packed in place once all are there. keep: how many entries of a row stay, None for all.
    """

    rows: int
    dense: bool
    keep: int | None
    entries: int = 0
    tile_targets: int = 0


class RowStore:
    """Edge rows of a trace as they come, and the influence that runs through them."""

    def __init__(self, columns: Columns, like: Tensor, size: StoreSize) -> None:
        """like: a tensor of the edges' type, on their device."""
        self.columns, self.like = columns, like
        self.dense, self.keep, self.tile_targets = size.dense, size.keep, size.tile_targets
        dtype = np.float64 if like.dtype == torch.float64 else np.float32
        in_place = size.dense and not like.is_cuda
        numbers = size.rows * columns.count
        self._memory = np.zeros(numbers if in_place else 0, dtype)
        self.block: Tensor | None = None
        if size.dense:
            memory = like.new_zeros(numbers) if like.is_cuda else torch.from_numpy(self._memory)
            self.block = memory.view(size.rows, columns.count)
        self._tile = like.new_empty(0)
        self.count = 0
        self._layers: list[int] = []  # of dense rows
        self._positions: list[int] = []
        self._column = GrowableArray(np.int32, size.entries)
        self._weight = GrowableArray(dtype, 0 if in_place else size.entries)
        self._lengths = GrowableArray(np.int64, size.rows)
        self._dropped = GrowableArray(np.float64, size.rows)
        self._mass = GrowableArray(np.float64, size.rows)
        self._trusted = True  # until rows come from elsewhere

    def next_block(self, count: int) -> Tensor:
        """Return [count, columns] zeros for the sweep to add the next rows to."""
        if self.block is not None:
            return self.block[self.count : self.count + count]
        size = count * self.columns.count
        if self._tile.numel() < size:
            self.release()
            self._tile = self.like.new_empty(max(count, self.tile_targets) * self.columns.count)
        return self._tile[:size].view(count, -1).zero_()

    def pack(self, block: Tensor, layer: Sequence[int], position: Sequence[int]) -> PackedRows:
        """Pack the rows of a block, of targets that read at (layer, position)."""
        if self.keep is not None and self.keep < self.columns.count:
            return PackedRows.from_largest(block, self.keep)
        return PackedRows.from_cones(block, self.columns, layer, position)

    def add(
        self, block: Tensor, layer: Sequence[int], position: Sequence[int], packed: PackedRows | None = None
    ) -> None:
        """Store the rows of `next_block`, now written. packed: the same rows, if they are packed already."""
        if self.dense:
            self.commit(layer, position)
        else:
            self.append(self.pack(block, layer, position) if packed is None else packed)

    def commit(self, layer: Sequence[int], position: Sequence[int]) -> None:
        """Count rows that were written to a dense store's block."""
        self._layers[self.count :] = layer
        self._positions[self.count :] = position
        self.count += len(layer)

    def export_committed(self) -> None:
        """Bring dense rows to the host, while a device works on what was launched after them."""

    def append(self, packed: PackedRows) -> None:
        self._column.append(packed.column)
        self._weight.append(packed.weight)
        self._dropped.append(packed.dropped)
        self._mass.append(packed.mass)
        self._lengths.append(packed.lengths)
        self.count += len(packed)

    def restore(self, packed: PackedRows, layer: Sequence[int], position: Sequence[int]) -> None:
        """Store packed rows of a checkpoint, of targets that read at (layer, position)."""
        self._trusted = False
        if self.block is None:
            self.append(packed)
            return
        ends = packed.lengths.cumsum()
        for row, begin, end in zip(self.next_block(len(packed)), ends - packed.lengths, ends, strict=True):
            column = torch.from_numpy(packed.column[begin:end]).to(self.like.device)
            weight = torch.from_numpy(packed.weight[begin:end]).to(self.like.device)
            row[column.long()] = weight
        self.commit(layer, position)

    def influence(self, order: Tensor, node: Tensor, weight: Tensor) -> Tensor:
        """Return the influence of every column on the outputs: [columns], on the device.

        order: the rows to go through, outputs first, then layers from the top; node: the feature of each, -1 for an
        output; weight: of each output.
        """
        if self.block is not None:
            return ops.influence(self.block, node, weight, order)
        total = self._packed_influence(*(t.cpu().numpy() for t in (order, node, weight)))
        return torch.from_numpy(total).to(self.like)

    def _packed_influence(self, order: np.ndarray, node: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Return the influence through packed rows; entries that were cut off take their share and hand nothing on."""
        lengths = self._lengths.view()
        ends = lengths.cumsum()
        column, size, total = self._column.view(), self._weight.view(), np.zeros(self.columns.count)
        for row, feature, entering in zip(order, node, weight, strict=True):
            entries = slice(ends[row] - lengths[row], ends[row])
            entering = entering + (total[feature] if feature >= 0 else 0.0)
            share = np.abs(size[entries])
            mass = share.sum(dtype=np.float64) + self._mass.view()[row]
            if entering and mass:
                total[column[entries]] += share * (entering / mass)
        return total

    def finish(self) -> PackedRows:
        """Return all rows and leave the store empty; after an interrupt in `append`, the rows before that one."""
        if self.block is not None:
            self._pack_block()
        lengths = self._lengths.finish(self.count)
        entries = int(lengths.sum())
        return PackedRows(
            lengths,
            self._column.finish(entries),
            self._weight.finish(entries),
            self._dropped.finish(self.count),
            self._mass.finish(self.count),
            self._trusted,
        )

    def release(self) -> None:
        """Free the block that rows are written to before they are packed."""
        self._tile = self._tile[:0].clone()

    def _pack_block(self) -> None:
        """Move the entries of dense rows together, each towards the front, so that no copy is needed."""
        assert self.block is not None
        block = self.block.numpy()
        flat = block.reshape(-1)
        end = 0
        layer, position = self._layers[: self.count], self._positions[: self.count]
        for lengths, column, weight in cone_entries(block, self.columns, layer, position):
            flat[end : end + len(weight)] = weight
            end += len(weight)
            self._column.append(column)
            self._lengths.append(lengths)
        self._weight.array = self._memory
        self._memory, self.block = self._memory[:0].copy(), None
        for sums in (self._dropped, self._mass):
            sums.append(np.zeros(self.count))
