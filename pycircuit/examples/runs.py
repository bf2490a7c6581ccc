"""External sort of activations: they arrive text by text and are read feature by feature.

Activations are buffered up to a bound, then sorted by feature and written to a run of files, one set a layer. A block
of features is read as one slice of each of its layer's files. Memory: ACTIVATIONS_AT_ONCE activations, or one
feature's if it has more, and three numbers a feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pycircuit.ops import SparseFeatures

ACTIVATIONS_AT_ONCE = 1 << 23  # in memory, about 20 bytes each in the buffer and 50 when a block is sorted
FEATURES_AT_ONCE = 512  # at most, in a block: their decoder rows are read with them


class Block(NamedTuple):
    """Activations of features first, first + 1, ...: feature first + i has [ptr[i], ptr[i + 1]), tokens ascending."""

    first: int
    ptr: np.ndarray
    token: np.ndarray
    value: np.ndarray


class ActivationRuns:
    """Runs of sorted activations. masks: for each layer, a mask of its features; others are not stored."""

    def __init__(self, folder: Path, masks: Sequence[np.ndarray]) -> None:
        self.folder, self.masks = folder, masks
        self.count = [np.zeros(len(mask), np.int64) for mask in masks]
        self._chunks: list[list[tuple[np.ndarray, ...]]] = [[] for _ in masks]
        self._pending = self._written = 0

    def add(self, begin: int, activations: Sequence[tuple[SparseFeatures, ...]]) -> None:
        """Add activations of consecutive texts, one entry a layer each; begin: first token of the first text."""
        for layer in range(len(self.masks)):
            layer_features = [features[layer] for features in activations]
            lengths = np.concatenate([f.row_ptr.diff().cpu().numpy() for f in layer_features])
            index, value = (
                np.concatenate([getattr(f, n).cpu().numpy() for f in layer_features]) for n in ("index", "value")
            )
            if not np.isfinite(value).all():
                entry = int(np.isfinite(value).argmin())
                got = f"{value[entry]} of feature {index[entry]} in layer {layer}"
                raise ValueError(f"write_examples: activations must be finite, got {got}")
            token = np.repeat(np.arange(begin, begin + len(lengths)), lengths)
            selected = self.masks[layer][index] & (value != 0)
            self._chunks[layer].append((index[selected], token[selected], value[selected]))
            self._pending += int(selected.sum())
        if self._pending >= ACTIVATIONS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write the buffered activations as a run."""
        if not self._pending:
            return
        for layer, chunks in enumerate(self._chunks):
            index, token, value = (np.concatenate(column) for column in zip(*chunks, strict=True))
            order = np.argsort(index, kind="stable")
            count = np.bincount(index, minlength=len(self.masks[layer]))
            np.save(self._file("ptr", layer, self._written), _ends(count))
            np.save(self._file("token", layer, self._written), token[order])
            np.save(self._file("value", layer, self._written), value[order])
            self.count[layer] += count
            chunks.clear()
        self._pending, self._written = 0, self._written + 1

    def _file(self, name: str, layer: int, run: int) -> Path:
        return self.folder / f"{name}-{layer}-{run}.npy"

    def blocks(self, layer: int) -> Iterator[Block]:
        """Yield all features of a layer, in order."""
        files = {
            name: [np.load(self._file(name, layer, run), mmap_mode="r") for run in range(self._written)]
            for name in ("ptr", "token", "value")
        }
        ends = _ends(self.count[layer])
        first, size = 0, len(self.count[layer])
        while first < size:
            fit = int(np.searchsorted(ends, ends[first] + ACTIVATIONS_AT_ONCE, side="right")) - 1
            last = min(max(first + 1, fit), first + FEATURES_AT_ONCE, size)
            yield _merge(first, last, files)
            first = last


def _ends(count: np.ndarray) -> np.ndarray:
    """Offsets of n consecutive groups by their counts: [n + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])


def _merge(first: int, last: int, files: dict[str, list[np.ndarray]]) -> Block:
    ptrs = [np.asarray(ptr[first : last + 1]) for ptr in files["ptr"]]
    counts = [np.diff(ptr) for ptr in ptrs]
    feature = _concatenate([np.repeat(np.arange(last - first), count) for count in counts])
    order = np.argsort(feature, kind="stable")  # the runs are in the order of tokens
    token, value = (
        _concatenate([array[ptr[0] : ptr[-1]] for array, ptr in zip(files[name], ptrs, strict=True)])
        for name in ("token", "value")
    )
    return Block(first, _ends(np.bincount(feature, minlength=last - first)), token[order], value[order])


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
