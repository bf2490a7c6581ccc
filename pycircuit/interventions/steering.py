"""Changed activations become changed MLP outputs: (new activation - present one) * decoder row, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.ops import SparseFeatures
from pycircuit.transcoders import Transcoders

from .intervention import Intervention

Placed = tuple[int, int, Intervention]  # row of the batch, position in this forward, the intervention there


@dataclass(frozen=True, eq=False)
class FeatureChanges:
    """The changed features of one layer: at places, indices ascending, to `value` + `factor` * their original.

    row, position: [places], row-major and distinct; row_ptr: [places + 1]; index, value, factor: [n].
    """

    row: Tensor
    position: Tensor
    row_ptr: Tensor
    index: Tensor
    value: Tensor
    factor: Tensor

    def place(self) -> Tensor:
        """The place of each entry: [n]."""
        return torch.arange(len(self.row), device=self.row.device).repeat_interleave(self.row_ptr.diff())


def changes_by_layer(placed: Iterable[Placed], like: Tensor) -> dict[int, FeatureChanges]:
    """Group interventions by layer.

    Of two for the same feature at the same position, the later one holds.
    """
    layers: dict[int, dict[tuple[int, int, int], Intervention]] = {}
    for row, position, intervention in placed:
        layers.setdefault(intervention.layer, {})[row, position, intervention.feature] = intervention
    return {layer: _feature_changes(interventions, like) for layer, interventions in layers.items()}


def _feature_changes(interventions: dict[tuple[int, int, int], Intervention], like: Tensor) -> FeatureChanges:
    keys = sorted(interventions)
    coordinates = torch.tensor(keys, dtype=torch.int64, device=like.device)
    places, counts = coordinates[:, :2].unique_consecutive(dim=0, return_counts=True)
    ordered = [interventions[key] for key in keys]
    return FeatureChanges(
        row=places[:, 0].contiguous(),
        position=places[:, 1].contiguous(),
        row_ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        index=coordinates[:, 2].contiguous(),
        value=like.new_tensor([intervention.value or 0.0 for intervention in ordered]),
        factor=like.new_tensor([intervention.factor or 0.0 for intervention in ordered]),
    )


def activations_at(features: SparseFeatures, row: Tensor, index: Tensor, size: int) -> Tensor:
    """Activations of features, zero where inactive: [n].

    row: [n], positions of `features`; index: [n], below size.
    """
    if not features.count:
        return features.value.new_zeros(len(row))
    keys = features.position() * size + features.index
    wanted = row * size + index
    nearest = torch.searchsorted(keys, wanted).clamp_(max=features.count - 1)
    return features.value[nearest].masked_fill_(keys[nearest] != wanted, 0)


Original = Callable[[int, FeatureChanges, Tensor], Tensor]


class Steering:
    """The changes of one forward of a batch, handed on from the layers that read to those that are written to.

    original: (layer, changes, x) -> [n], activations without interventions. frozen: layers whose MLP outputs stay as
    they were, so that changes there are counted from the original. written: layers that changes reach. difference: by
    how much each entry of a layer's changes moved its activation, once the layer was read.
    """

    def __init__(
        self,
        transcoders: Transcoders,
        changes: dict[int, FeatureChanges],
        original: Original,
        frozen: range,
        written: range,
    ) -> None:
        self.transcoders = transcoders
        self.changes = changes
        self.original = original
        self.frozen = frozen
        self.written = written
        self.pending: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.difference: dict[int, Tensor] = {}
        self.extremes: list[Tensor] = []  # smallest and largest number of what each layer's features write

    def add(self, layer: int, row: Tensor, position: Tensor, change: Tensor) -> None:
        """Add a change to a layer's MLP output, or with layer -1 to the first stream.

        change: [n, width].
        """
        if layer < 0 or layer in self.written:
            self.pending.setdefault(layer, []).append((row, position, change))

    def read(self, layer: int, x: Tensor) -> None:
        """Work out the changes of a layer's features.

        x: [rows, positions, width], what its transcoder reads.
        """
        changes = self.changes.get(layer)
        if changes is None:
            return
        original = self.original(layer, changes, x)
        present = original if layer in self.frozen else self.present(layer, changes, x, changes.row)
        value = changes.value + changes.factor * original - present
        self.difference[layer] = value
        difference = SparseFeatures(changes.row_ptr, changes.index, value)
        written = ops.decode(difference, self.transcoders.w_dec[layer])
        self.extremes.append(torch.stack(written.aminmax()))
        for target, change in enumerate(written[None] if written.ndim == 2 else written, layer):
            self.add(target, changes.row, changes.position, change)

    def largest(self) -> float:
        """Return the largest size of a number that changes add to an MLP's output; NaN if one is."""
        return float(torch.stack(self.extremes).abs().max()) if self.extremes else 0.0

    def unchanged(self) -> set[tuple[int, int, int, int]]:
        """(row, layer, position, feature) of the changes that moved no activation."""
        result: set[tuple[int, int, int, int]] = set()
        for layer, difference in self.difference.items():
            changes = self.changes[layer]
            still = (difference == 0).nonzero()[:, 0]
            place = changes.place()[still]
            columns = (changes.row[place], changes.position[place], changes.index[still])
            row, position, feature = (column.tolist() for column in columns)
            result.update((r, layer, p, f) for r, p, f in zip(row, position, feature, strict=True))
        return result

    def present(self, layer: int, changes: FeatureChanges, x: Tensor, row: Tensor) -> Tensor:
        """Present activations of the changed features, in these rows of the batch: [n]; NaN where a row overflowed."""
        read, place = x[row, changes.position], changes.place()
        overflowed = ~read.isfinite().all(1)
        features = self.transcoders.encode(layer, read.masked_fill(overflowed[:, None], 0.0))
        present = activations_at(features, place, changes.index, self.transcoders.size(layer))
        return present.masked_fill(overflowed[place], torch.nan)

    def write(self, layer: int, y: Tensor) -> Tensor:
        """An MLP's output with the changes, in memory of its own.

        y: [rows, positions, width].
        """
        pending = self.pending.pop(layer, ())
        if pending:
            y = y.clone()
        for row, position, change in pending:
            y.index_put_((row, position), change.to(y.dtype), accumulate=True)
        return y
