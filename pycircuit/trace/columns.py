"""Columns of an edge row: one for each source node, and which of them a target can see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from pycircuit.model.replacement import LocalReplacement


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of an edge row: features by layer and position, then errors by layer and position, then tokens.

    before: [layers, positions + 1], features of a layer at earlier positions.
    """

    before: np.ndarray
    positions: int

    @classmethod
    def of(cls, local: LocalReplacement) -> Columns:
        """Columns of a frozen prompt, counted once: a GPU has to be waited for."""
        if local not in _COUNTED:
            before = torch.stack([f.row_ptr for f in local.features]).cpu().numpy()
            _COUNTED[local] = cls(before, local.model.positions)
        return _COUNTED[local]

    @property
    def layers(self) -> int:
        return len(self.before)

    @cached_property
    def feature_start(self) -> list[int]:
        """First column of each layer's features, and their end: [layers + 1]."""
        return list(accumulate(self.before[:, -1].tolist(), initial=0))

    @property
    def features(self) -> int:
        return self.feature_start[-1]

    @property
    def busiest(self) -> int:
        """Features of the layer that has the most."""
        return int(self.before[:, -1].max())

    @property
    def count(self) -> int:
        return self.features + (self.layers + 1) * self.positions

    def of_features(self, layer: int) -> slice:
        return slice(*self.feature_start[layer : layer + 2])

    def of_errors(self, layer: int) -> slice:
        start = self.features + layer * self.positions
        return slice(start, start + self.positions)

    @property
    def of_tokens(self) -> slice:
        return self.of_errors(self.layers)

    def cone(self, layer: int, position: int) -> list[tuple[int, int]]:
        """Return [begin, end) of every run of columns that a target reading at (layer, position) can see, ascending."""
        seen = self.before[:layer, position + 1].tolist()
        features = [(s, s + n) for s, n in zip(self.feature_start, seen, strict=False) if n]
        first, visible = self.features, position + 1
        errors = [(first + lower * self.positions, first + lower * self.positions + visible) for lower in range(layer)]
        tokens = first + self.layers * self.positions
        return [*features, *errors, (tokens, tokens + visible)]

    def feature_positions(self) -> tuple[Tensor, Tensor]:
        """Return (layer, position) of every feature: [features] each."""
        counts = np.diff(self.before, axis=1)
        layer, position = (numbers.ravel() for numbers in np.indices(counts.shape))
        return torch.from_numpy(layer.repeat(counts.ravel())), torch.from_numpy(position.repeat(counts.ravel()))

    def cone_sizes(self, layer: Tensor, position: Tensor) -> Tensor:
        """Return the number of columns that each target can see: [targets]."""
        seen = np.concatenate([np.zeros((1, self.positions), np.int64), self.before[:, 1:].cumsum(0)])
        visible = position.cpu() + 1
        return torch.from_numpy(seen)[layer.cpu(), position.cpu()] + (layer.cpu() + 1) * visible


_COUNTED: WeakKeyDictionary[LocalReplacement, Columns] = WeakKeyDictionary()
