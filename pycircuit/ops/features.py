"""Sparse features of one layer, compressed by position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseFeatures:
    """Active features in CSR by position, indices ascending within a position.

    row_ptr: [positions + 1] int64; index: [n] int64; value: [n] float.
    """

    row_ptr: Tensor
    index: Tensor
    value: Tensor

    @property
    def positions(self) -> int:
        return self.row_ptr.numel() - 1

    @property
    def count(self) -> int:
        return self.index.numel()

    def position(self) -> Tensor:
        """Position of every entry: [n] int64."""
        lengths = self.row_ptr.diff()
        positions = torch.arange(self.positions, device=lengths.device)
        return positions.repeat_interleave(lengths, output_size=self.count)

    def dense(self, size: int) -> Tensor:
        """Dense values, zero where a feature is silent: [positions, size]."""
        out = self.value.new_zeros(self.positions, size)
        out[self.position(), self.index] = self.value
        return out

    def to(self, device: torch.device | str) -> SparseFeatures:
        return SparseFeatures(self.row_ptr.to(device), self.index.to(device), self.value.to(device))

    def __repr__(self) -> str:
        return (
            f"SparseFeatures(positions={self.positions}, active={self.count}, {self.value.dtype}, {self.value.device})"
        )
