"""Activations turned round: they come text by text and are asked for feature by feature.

What has come is held up to a bound, then sorted by feature and written to files, one a layer. A block of features is
read as one slice of each of its layer's files. Memory: HELD activations, or one feature's where it has more; and three
numbers a feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pycircuit.ops import SparseFeatures

HELD = 1 << 23  # activations in memory, about 20 bytes each as they come and 50 as a block is sorted
BLOCK = 512  # features read together, at the most: their decoder rows are read with them


class Block(NamedTuple):
    """Activations of features first, first + 1, ...: those of each [ptr[i], ptr[i + 1]), in the order of tokens."""

    first: int
    ptr: np.ndarray
    token: np.ndarray
    value: np.ndarray


class Runs:
    """wanted: for each layer, a mask of its features; what others do is forgotten."""

    def __init__(self, folder: Path, wanted: Sequence[np.ndarray]) -> None:
        self.folder, self.wanted = folder, wanted
        self.count = [np.zeros(len(mask), np.int64) for mask in wanted]
        self._held: list[list[tuple[np.ndarray, ...]]] = [[] for _ in wanted]
        self._pending = self._written = 0

    def add(self, begin: int, found: Sequence[tuple[SparseFeatures, ...]]) -> None:
        """Texts one after another, the first of which begins at this token; each has one entry a layer."""
        for layer in range(len(self.wanted)):
            parts = [features[layer] for features in found]
            lengths = np.concatenate([f.row_ptr.diff().cpu().numpy() for f in parts])
            index, value = (np.concatenate([getattr(f, n).cpu().numpy() for f in parts]) for n in ("index", "value"))
            if not np.isfinite(value).all():
                at = int(np.isfinite(value).argmin())
                got = f"{value[at]} of feature {index[at]} in layer {layer}"
                raise ValueError(f"write_examples: activations must be finite, got {got}")
            token = np.repeat(np.arange(begin, begin + len(lengths)), lengths)
            kept = self.wanted[layer][index] & (value != 0)
            self._held[layer].append((index[kept], token[kept], value[kept]))
            self._pending += int(kept.sum())
        if self._pending >= HELD:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self._pending:
            return
        for layer, parts in enumerate(self._held):
            index, token, value = (np.concatenate(column) for column in zip(*parts, strict=True))
            order = np.argsort(index, kind="stable")
            count = np.bincount(index, minlength=len(self.wanted[layer]))
            np.save(self._file("ptr", layer, self._written), _ends(count))
            np.save(self._file("token", layer, self._written), token[order])
            np.save(self._file("value", layer, self._written), value[order])
            self.count[layer] += count
            parts.clear()
        self._pending, self._written = 0, self._written + 1

    def _file(self, what: str, layer: int, run: int) -> Path:
        return self.folder / f"{what}-{layer}-{run}.npy"

    def blocks(self, layer: int) -> Iterator[Block]:
        """All features of a layer, in order."""
        held = {
            what: [np.load(self._file(what, layer, run), mmap_mode="r") for run in range(self._written)]
            for what in ("ptr", "token", "value")
        }
        ends = _ends(self.count[layer])
        first, size = 0, len(self.count[layer])
        while first < size:
            fit = int(np.searchsorted(ends, ends[first] + HELD, side="right")) - 1
            last = min(max(first + 1, fit), first + BLOCK, size)
            yield _merged(first, last, held)
            first = last


def _ends(count: np.ndarray) -> np.ndarray:
    """[n] -> [n + 1], where each begins."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])


def _merged(first: int, last: int, held: dict[str, list[np.ndarray]]) -> Block:
    ptrs = [np.asarray(ptr[first : last + 1]) for ptr in held["ptr"]]
    counts = [np.diff(ptr) for ptr in ptrs]
    feature = _joined([np.repeat(np.arange(last - first), count) for count in counts])
    order = np.argsort(feature, kind="stable")  # the runs are in the order of tokens
    token, value = (
        _joined([array[ptr[0] : ptr[-1]] for array, ptr in zip(held[what], ptrs, strict=True)])
        for what in ("token", "value")
    )
    return Block(first, _ends(np.bincount(feature, minlength=last - first)), token[order], value[order])


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
