"""The edge rows of a trace on a GPU: packed, cut and ranked there, and brought to the host while it sweeps."""

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
from .row_store import Growing, Part, Store


class DeviceStore(Store):
    """Dense rows stay on the device and are packed on a stream of their own, others come to the host tile by tile.

    ranked: the device keeps packed rows too, so that it ranks features by them; otherwise the host does.
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
        ranked: bool = False,
    ) -> None:
        super().__init__(columns, like, rows, dense, keep, entries, targets)
        self._exporter = Exporter(like.device)
        starts = columns.feature_start
        self._ranked = RankedRows(like, rows, entries, starts, columns.count) if ranked else None
        # Where dense rows are packed, before what else is launched; and when those that are settled were written.
        self._side = (
            (torch.cuda.Stream(like.device, priority=-1), torch.cuda.Event()) if dense and like.is_cuda else None
        )
        self._exported = 0, [0] * len(self._arrays())  # dense rows, and how long they have made the arrays

    @property
    def _cut(self) -> int | None:
        """How many entries of a row stay, None where none can be too many."""
        return None if self.keep is None or self.keep >= self.columns.count else self.keep

    def pack(self, filled: Tensor, layer: Sequence[int], position: Sequence[int]) -> Part:
        """The entries of rows, on the host: what lies outside of a target's cone is zero."""
        store = DeviceStore(self.columns, self.like, len(filled), False, self.keep)
        store._exporter = self._exporter
        store.add(filled, layer, position)
        return store.finish()

    def add(self, filled: Tensor, layer: Sequence[int], position: Sequence[int], part: Part | None = None) -> None:
        if self.dense:
            self.settle(layer, position)
        else:
            self._add_packed(filled)

    def _add_packed(self, filled: Tensor) -> None:
        for rows in device_rows.packed(filled, self._cut, self._ranked is not None):
            self._export(rows)
            if self._ranked is not None:
                self._ranked.append(rows)
        self.count += len(filled)

    def settle(self, layer: Sequence[int], position: Sequence[int]) -> None:
        super().settle(layer, position)
        if self._side is not None:
            self._side[1].record()

    def export_settled(self) -> None:
        if self.block is None:
            return
        if self._side is not None:
            self._side[0].wait_event(self._side[1])
        with nullcontext() if self._side is None else torch.cuda.stream(self._side[0]):
            for rows in device_rows.packed(self.block[self._exported[0] : self.count], self._cut):
                self._export(rows)
                done = self._exported[0] + len(rows.lengths)
                self._exported = done, [array.size for array in self._arrays()]

    def _arrays(self) -> tuple[Growing, ...]:
        return self._column, self._weight, self._lengths, self._dropped, self._mass

    def _export(self, rows: DeviceRows) -> None:
        for source, array in ((rows.column, self._column), (rows.weight, self._weight), (rows.lengths, self._lengths)):
            self._exporter.append(source, array)
        for sums, array in ((rows.dropped, self._dropped), (rows.mass, self._mass)):
            if sums is None:
                array.append(np.zeros(len(rows.lengths)))
            else:
                self._exporter.append(sums, array)

    def take(self, part: Part) -> None:
        """Keep packed rows of the host."""
        super().take(part)
        if self._ranked is not None:
            arrays = part.lengths, part.column, part.weight, part.rows().masses() + part.mass
            lengths, column, weight, magnitude = (torch.from_numpy(a).to(self.like.device) for a in arrays)
            self._ranked.append(DeviceRows(lengths, column, weight, magnitude=magnitude))

    def influence(self, order: Tensor, node: Tensor, weight: Tensor) -> Tensor:
        if self._ranked is not None:
            return self._ranked.influence(order, node, weight).to(self.like)
        self._exporter.finish()
        return super().influence(order, node, weight)

    def finish(self) -> Part:
        if self.block is not None:
            for array, size in zip(self._arrays(), self._exported[1], strict=True):
                array.size = size  # without what an interrupted export left behind it
            self.export_settled()
            self.block, self.dense = None, False
        self._exporter.finish()
        self._ranked = None
        return super().finish()
