"""Decoder rows left in a file: an op reads each active row once, in file order, and nothing else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pycircuit.files.reading import read_into
from pycircuit.files.safetensors import FLOATS, tensor_entries

from .features import SparseFeatures

DTYPES = {name: FLOATS[name] for name in ("F32", "BF16", "F16")}


@dataclass(frozen=True, eq=False)
class FileRows:
    """A decoder [features, width] or [features, slots, width] in a file; decode and edge_scores take it as w_dec.

    stored: float32, bfloat16 or float16 values from byte `offset` on. Memory: the distinct active rows.
    """

    path: str | os.PathLike[str]
    offset: int
    shape: tuple[int, ...]
    stored: torch.dtype

    @classmethod
    def safetensors(cls, path: str | os.PathLike[str], name: str) -> FileRows:
        """The tensor `name` of a safetensors file."""
        entries = tensor_entries(Path(path), "FileRows")
        if name not in entries:
            known = ", ".join(sorted(entries)[:8]) or "none"
            raise KeyError(f"FileRows: name must be a tensor of {path} ({known}), got {name!r}")
        offset, shape, kind = entries[name]
        if kind not in DTYPES:
            raise TypeError(f"FileRows: {name} must be one of {', '.join(DTYPES)}, got {kind}")
        return cls(path, offset, shape, DTYPES[kind])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows as ops see them: float16 is widened, which is exact."""
        return torch.float32 if self.stored == torch.float16 else self.stored

    def __post_init__(self) -> None:
        if self.stored not in DTYPES.values():
            raise TypeError(f"FileRows: stored must be float32, bfloat16 or float16, got {self.stored}")
        if len(self.shape) not in (2, 3) or any(n < 0 for n in self.shape):
            raise ValueError(f"FileRows: shape must have 2 or 3 dimensions, got {list(self.shape)}")
        needed, size = prod(self.shape) * self.stored.itemsize, os.stat(self.path).st_size
        if self.offset < 0 or self.offset + needed > size:
            raise ValueError(
                f"FileRows: {self.path} must hold {needed} bytes from {self.offset} on, got a file of {size} bytes"
            )

    def gather(self, features: SparseFeatures) -> tuple[SparseFeatures, Tensor]:
        """Features numbered anew over the rows they use, and those rows: [distinct, (slots,) width]."""
        used, renumbered = features.index.unique(sorted=True, return_inverse=True)
        rows = torch.empty(len(used), *self.shape[1:], dtype=self.stored, device="cpu")
        self._read(used.tolist(), memoryview(rows.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        rows = rows.to(features.index.device, self.dtype)
        return SparseFeatures(features.row_ptr, renumbered, features.value), rows

    def row_range(self, begin: int, end: int) -> Tensor:
        """Rows begin .. end: [end - begin, (slots,) width]."""
        index = torch.arange(begin, end)
        return self.gather(SparseFeatures(torch.tensor([0, len(index)]), index, index.new_empty(0)))[1]

    def _read(self, used: list[int], buffer: memoryview) -> None:
        """Read rows of ascending features; neighbouring rows in one read."""
        step = prod(self.shape[1:]) * self.stored.itemsize
        starts = [i for i, row in enumerate(used) if i == 0 or row != used[i - 1] + 1]
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for first, last in pairwise([*starts, len(used)]):
                offset = self.offset + used[first] * step
                read_into(file, [buffer[first * step : last * step]], offset, self.path, "FileRows")
        finally:
            os.close(file)
