"""Changed activations become changed MLP outputs: (new activation - present one) * decoder row, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.ops import SparseFeatures
from pycircuit.transcoders import Transcoders

from .intervention import Intervention

Place = tuple[int, int, Intervention]  # row of the batch, position in this forward, what happens there


@dataclass(frozen=True, eq=False)
class Entries:
    """The features of one layer that change: at `place`, indices ascending, `value` + `factor` * what they were.

    row, position: [places], row-major and distinct; row_ptr: [places + 1]; index, value, factor: [n].
    """

    row: Tensor
    position: Tensor
    row_ptr: Tensor
    index: Tensor
    value: Tensor
    factor: Tensor

    def place(self) -> Tensor:
        """Which of the places each entry is at: [n]."""
        return torch.arange(len(self.row), device=self.row.device).repeat_interleave(self.row_ptr.diff())


def entries_of(places: Iterable[Place], like: Tensor) -> dict[int, Entries]:
    """By layer. Where two interventions mean the same feature at the same position, the later one holds."""
    found: dict[int, dict[tuple[int, int, int], Intervention]] = {}
    for row, position, one in places:
        found.setdefault(one.layer, {})[row, position, one.feature] = one
    return {layer: _entries(changes, like) for layer, changes in found.items()}


def _entries(changes: dict[tuple[int, int, int], Intervention], like: Tensor) -> Entries:
    keys = sorted(changes)
    at = torch.tensor(keys, dtype=torch.int64, device=like.device)
    places, counts = at[:, :2].unique_consecutive(dim=0, return_counts=True)
    kept = [changes[key] for key in keys]
    return Entries(
        row=places[:, 0].contiguous(),
        position=places[:, 1].contiguous(),
        row_ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        index=at[:, 2].contiguous(),
        value=like.new_tensor([one.value or 0.0 for one in kept]),
        factor=like.new_tensor([one.factor or 0.0 for one in kept]),
    )


def activations_at(found: SparseFeatures, row: Tensor, index: Tensor, size: int) -> Tensor:
    """How active features are, zero where silent. row: [n], positions of `found`; index: [n], below size."""
    if not found.count:
        return found.value.new_zeros(len(row))
    keys = found.position() * size + found.index
    wanted = row * size + index
    at = torch.searchsorted(keys, wanted).clamp_(max=found.count - 1)
    return found.value[at].masked_fill_(keys[at] != wanted, 0)


Original = Callable[[int, Entries, Tensor], Tensor]


class Steering:
    """The changes of one forward of a batch, handed on from the layers that read to those that are written to.

    original: (layer, entries, x) -> [n], activations without interventions. held: layers whose MLP outputs stay as
    they were, so that changes there are counted from the original. written: layers that changes reach.
    """

    def __init__(
        self, transcoders: Transcoders, entries: dict[int, Entries], original: Original, held: range, written: range
    ) -> None:
        self.transcoders, self.entries, self.original = transcoders, entries, original
        self.held, self.written = held, written
        self.pending: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, layer: int, row: Tensor, position: Tensor, change: Tensor) -> None:
        """change: [n, width], to be added to what the layer's MLP writes; layer -1: to the stream's beginning."""
        if layer < 0 or layer in self.written:
            self.pending.setdefault(layer, []).append((row, position, change))

    def read(self, layer: int, x: Tensor) -> None:
        """x: [rows, positions, width], what this layer's transcoder reads."""
        e = self.entries.get(layer)
        if e is None:
            return
        original = self.original(layer, e, x)
        present = original if layer in self.held else self.present(layer, e, x, e.row)
        change = SparseFeatures(e.row_ptr, e.index, e.value + e.factor * original - present)
        written = ops.decode(change, self.transcoders.w_dec[layer])
        for at, part in enumerate(written[None] if written.ndim == 2 else written, layer):
            self.add(at, e.row, e.position, part)

    def present(self, layer: int, e: Entries, x: Tensor, row: Tensor) -> Tensor:
        """How active the entries' features are now, in these rows of the batch: [n]."""
        found = self.transcoders.encode(layer, x[row, e.position])
        return activations_at(found, e.place(), e.index, self.transcoders.size(layer))

    def write(self, layer: int, y: Tensor) -> Tensor:
        """y: [rows, positions, width], what the MLP writes -> the same with the changes, in memory of its own."""
        parts = self.pending.pop(layer, ())
        if parts:
            y = y.clone()
        for row, position, change in parts:
            y.index_put_((row, position), change.to(y.dtype), accumulate=True)
        return y


def earliest(interventions: Sequence[Intervention]) -> int:
    return min(one.layer for one in interventions)
