"""Edge rows of a trace on a GPU: packed, cut and ranked there, and brought to the host during the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from . import device_rows
from .columns import Columns
from .device_export import Exporter
from .device_rows import DeviceRows, RankedRows
from .row_store import GrowableArray, PackedRows, RowStore, StoreSize


class DeviceStore(RowStore):
    """A row store on a GPU. Dense rows stay there and are packed on their own stream; others come to the host at once.

    ranked: the GPU keeps packed rows too and ranks features by them; otherwise the host does.
    """

    def __init__(self, columns: Columns, like: Tensor, size: StoreSize, ranked: bool = False) -> None:
        super().__init__(columns, like, size)
        self._exporter = Exporter(like.device)
        self._ranked = RankedRows(like, size, columns) if ranked else None
        self._packing: torch.cuda.Stream | None = None  # of dense rows, ahead of what is launched later
        self._written: torch.cuda.Event | None = None  # after the last committed row
        if size.dense and like.is_cuda:
            self._packing = torch.cuda.Stream(like.device, priority=-1)
            self._written = torch.cuda.Event()
        # Dense rows, and the sizes of the arrays then: one binding, as an interrupt may come between two.
        self._exported = (0, [0] * len(self._arrays()))

    @property
    def _cut(self) -> int | None:
        """Entries of a row that stay, None where no row can have more."""
        return None if self.keep is None or self.keep >= self.columns.count else self.keep

    def pack(self, block: Tensor, layer: Sequence[int], position: Sequence[int]) -> PackedRows:
        """Pack the rows of a block on the device, for the host; entries outside a target's cone are zero."""
        store = DeviceStore(self.columns, self.like, StoreSize(len(block), False, self.keep))
        store._exporter = self._exporter
        store.add(block, layer, position)
        return store.finish()

    def add(
        self, block: Tensor, layer: Sequence[int], position: Sequence[int], packed: PackedRows | None = None
    ) -> None:
        if self.dense:
            self.commit(layer, position)
        else:
            self._add_packed(block)

    def _add_packed(self, block: Tensor) -> None:
        for rows in device_rows.packed(block, self._cut, self._ranked is not None):
            self._export(rows)
            if self._ranked is not None:
                self._ranked.append(rows)
        self.count += len(block)

    def commit(self, layer: Sequence[int], position: Sequence[int]) -> None:
        super().commit(layer, position)
        if self._written is not None:
            self._written.record()

    def export_committed(self) -> None:
        if self.block is None:
            return
        if self._packing is not None and self._written is not None:
            self._packing.wait_event(self._written)
        with nullcontext() if self._packing is None else torch.cuda.stream(self._packing):
            for rows in device_rows.packed(self.block[self._exported[0] : self.count], self._cut):
                self._export(rows)
                done = self._exported[0] + len(rows.lengths)
                self._exported = (done, [array.size for array in self._arrays()])

    def _arrays(self) -> tuple[GrowableArray, ...]:
        return self._column, self._weight, self._lengths, self._dropped, self._mass

    def _export(self, rows: DeviceRows) -> None:
        for source, array in ((rows.column, self._column), (rows.weight, self._weight), (rows.lengths, self._lengths)):
            self._exporter.append(source, array)
        for sums, array in ((rows.dropped, self._dropped), (rows.mass, self._mass)):
            if sums is None:
                array.append(np.zeros(len(rows.lengths)))
            else:
                self._exporter.append(sums, array)

    def append(self, packed: PackedRows) -> None:
        super().append(packed)
        if self._ranked is not None:
            arrays = packed.lengths, packed.column, packed.weight, packed.to_rows().masses() + packed.mass
            lengths, column, weight, magnitude = (torch.from_numpy(a).to(self.like.device) for a in arrays)
            self._ranked.append(DeviceRows(lengths, column, weight, magnitude=magnitude))

    def influence(self, order: Tensor, node: Tensor, weight: Tensor) -> Tensor:
        if self._ranked is not None:
            return self._ranked.influence(order, node, weight).to(self.like)
        if self.block is None:  # the host ranks
            self._exporter.finish()
        return super().influence(order, node, weight)

    def finish(self) -> PackedRows:
        if self.block is not None:
            self._exporter.finish()  # of an interrupted export too, before its rows are exported again
            for array, size in zip(self._arrays(), self._exported[1], strict=True):
                array.size = size  # without the rows of an interrupted export
            self.export_committed()
            self.block, self.dense = None, False
        self._exporter.finish()
        self._ranked = None
        return super().finish()
