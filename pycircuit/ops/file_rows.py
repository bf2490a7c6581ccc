"""Decoder rows left in a file: an op reads each active row once, in file order, and nothing else.

A safetensors file is 8 bytes (the length of the header, little-endian), a JSON header naming each tensor's
type, shape and span, and the tensors one after another without gaps.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .features import SparseFeatures

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
          "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes; what the format's own reader allows


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
        return cls(path, *_entry(Path(path), name))

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows as ops see them: float16 is widened, which is exact."""
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
        """The same features numbered anew over the rows they use, and those rows: [distinct, (slots,) width]."""
        used, renumbered = features.index.unique(sorted=True, return_inverse=True)
        rows = torch.empty(len(used), *self.shape[1:], dtype=self.stored, device="cpu")
        self._read(used.tolist(), memoryview(rows.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        rows = rows.to(features.index.device, self.dtype)
        return SparseFeatures(features.row_ptr, renumbered, features.value), rows

    def _read(self, used: list[int], into: memoryview) -> None:
        """Neighbouring rows in one read."""
        step = prod(self.shape[1:]) * self.stored.itemsize
        starts = [i for i, row in enumerate(used) if i == 0 or row != used[i - 1] + 1]
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for first, last in pairwise([*starts, len(used)]):
                self._fill(file, into[first * step : last * step], self.offset + used[first] * step)
        finally:
            os.close(file)

    def _fill(self, file: int, into: memoryview, at: int) -> None:
        while into:  # one read may stop short, and never passes 2 GB
            count = os.preadv(file, [into], at)
            if count == 0:
                raise ValueError(f"FileRows: {self.path} must not shrink while in use, got its end at byte {at}")
            into, at = into[count:], at + count


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(the JSON header, where the tensors begin)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"FileRows: {path} must hold its header, got {length} bytes of it in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"FileRows: {path} must have a header of JSON, got {text[:40]!r}: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"FileRows: {path} must have a JSON object as its header, got {type(header).__name__}")
    header.pop("__metadata__", None)
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """[begin, end) of a tensor after the header, once its entry is known to be sound."""
    lists = [entry.get(key) for key in ("shape", "data_offsets")] if isinstance(entry, dict) else [None]
    if not all(isinstance(v, list) and all(type(n) is int and n >= 0 for n in v) for v in lists):
        raise ValueError(f"FileRows: {path} must give {name} a shape and data_offsets, got {entry!r}")
    span, size = entry["data_offsets"], _SIZES.get(str(entry.get("dtype")))
    expected = None if size is None else prod(entry["shape"]) * size
    if len(span) != 2 or span[0] > span[1] or expected not in (None, span[1] - span[0]):
        raise ValueError(f"FileRows: {path} must give {name} {expected} bytes, got data_offsets {span}")
    return span[0], span[1]


def entries(path: Path) -> dict[str, tuple[int, tuple[int, ...], str]]:
    """(byte offset, shape, type) of every tensor of a safetensors file; the whole header is checked."""
    header, begin = _header(path)
    spans = sorted((*_span(path, key, entry), key) for key, entry in header.items())
    at = 0
    for first, last, key in spans:
        if first != at:
            raise ValueError(f"FileRows: {path} must hold tensors end to end, got {key} at {first}, expected {at}")
        at = last
    if begin + at != path.stat().st_size:
        size = path.stat().st_size
        raise ValueError(f"FileRows: {path} must be {begin + at} bytes by its header, got {size}; is it truncated?")
    return {key: (begin + first, tuple(header[key]["shape"]), str(header[key].get("dtype"))) for first, _, key in spans}


def _entry(path: Path, name: str) -> tuple[int, tuple[int, ...], torch.dtype]:
    found = entries(path)
    if name not in found:
        known = ", ".join(sorted(found)[:8]) or "none"
        raise KeyError(f"FileRows: name must be a tensor of {path} ({known}), got {name!r}")
    offset, shape, kind = found[name]
    if kind not in DTYPES:
        raise TypeError(f"FileRows: {name} must be one of {', '.join(DTYPES)}, got {kind}")
    return offset, shape, DTYPES[kind]
