"""Safetensors files: headers parsed and checked, tensors written a few rows at a time.

Such a file is 8 bytes (the length of the header, little-endian), a JSON header naming each tensor's type, shape and
span, and the tensors one after another without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
}
FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
_SIZES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
_LONGEST_HEADER = 100_000_000  # bytes; what the format's own reader allows
_CHUNK = 32 << 20  # bytes in memory at a time


class TensorEntry(NamedTuple):
    """Place of a tensor in its file: byte offset, shape and type as the header names it."""

    offset: int
    shape: tuple[int, ...]
    kind: str


class RowSource(Protocol):
    """Tensor that is read a range of rows at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def row_range(self, begin: int, end: int) -> Tensor: ...


def tensor_entries(path: Path, op: str = "load") -> dict[str, TensorEntry]:
    """Entries of every tensor of a safetensors file; the whole header is checked."""
    header, begin = _parsed_header(path, op)
    spans = sorted((*_span(path, op, name, entry), name) for name, entry in header.items())
    offset = 0
    for first, last, name in spans:
        if first != offset:
            raise ValueError(f"{op}: {path} must hold tensors end to end, got {name} at {first}, expected {offset}")
        offset = last
    size = path.stat().st_size
    if begin + offset != size:
        raise ValueError(f"{op}: {path} must be {begin + offset} bytes by its header, got {size}; is it truncated?")
    return {
        name: TensorEntry(begin + first, tuple(header[name]["shape"]), str(header[name].get("dtype")))
        for first, _, name in spans
    }


def _parsed_header(path: Path, op: str) -> tuple[dict[str, Any], int]:
    """The JSON header, and the offset where the tensors begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{op}: {path} must hold its header, got {length} bytes of it in a file of {size}")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {path} must have a header of JSON, got {text[:40]!r}: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{op}: {path} must have a JSON object as its header, got {type(header).__name__}")
    header.pop("__metadata__", None)
    return header, 8 + length


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Object of JSON; an error if it has a name twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def _span(path: Path, op: str, name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor after the header, once its entry is known to be sound."""
    lists = [entry.get(key) for key in ("shape", "data_offsets")] if isinstance(entry, dict) else [None]
    if not all(isinstance(v, list) and all(type(n) is int and n >= 0 for n in v) for v in lists):
        raise ValueError(f"{op}: {path} must give {name} a shape and data_offsets, got {entry!r}")
    span, size = entry["data_offsets"], _SIZES.get(str(entry.get("dtype")))
    expected = None if size is None else prod(entry["shape"]) * size
    if len(span) != 2 or span[0] > span[1] or expected not in (None, span[1] - span[0]):
        raise ValueError(f"{op}: {path} must give {name} {expected} bytes, got data_offsets {span}")
    return span[0], span[1]


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Bytes before tensors that follow in this order; they begin at a multiple of 8 bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor | RowSource], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file, widest types first, so that every tensor lies on a multiple of its own size."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    file.write(safetensors_header({name: (t.dtype, tuple(t.shape)) for name, t in ordered}, metadata))
    for _, t in ordered:
        _write_rows(file, t)


def _write_rows(file: BinaryIO, t: Tensor | RowSource) -> None:
    for chunk in _chunks(t):
        file.write(memoryview(chunk.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _chunks(t: Tensor | RowSource) -> Iterator[Tensor]:
    """All rows in order, a chunk at a time, on the CPU."""
    count = t.shape[0] if len(t.shape) else 1
    step = max(1, _CHUNK // max(1, prod(t.shape[1:]) * t.dtype.itemsize))
    for begin in range(0, count, step):
        end = min(begin + step, count)
        if isinstance(t, Tensor):
            yield (t[begin:end] if t.ndim else t[None]).detach().cpu().contiguous()
        else:
            yield t.row_range(begin, end)
