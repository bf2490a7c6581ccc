"""Safetensors files written a few rows at a time, into a file that is open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import BinaryIO

import torch
from torch import Tensor

from pycircuit.ops import FileRows, SparseFeatures

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_CHUNK = 32 << 20  # bytes in memory at a time


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
    file: BinaryIO, tensors: Mapping[str, Tensor | FileRows], metadata: Mapping[str, str] | None = None
) -> None:
    """Widest types first, so that every tensor lies on a multiple of its own size."""
    ordered = sorted(tensors.items(), key=lambda item: (-_dtype(item[1]).itemsize, item[0]))
    file.write(safetensors_header({name: (_dtype(t), tuple(t.shape)) for name, t in ordered}, metadata))
    for _, t in ordered:
        _write_rows(file, t)


def _write_rows(file: BinaryIO, t: Tensor | FileRows) -> None:
    for chunk in _chunks(t):
        file.write(memoryview(chunk.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _dtype(t: Tensor | FileRows) -> torch.dtype:
    return t.dtype


def _chunks(t: Tensor | FileRows) -> Iterator[Tensor]:
    """All rows in order, some at a time, on the CPU."""
    count = t.shape[0] if len(t.shape) else 1
    step = max(1, _CHUNK // max(1, prod(t.shape[1:]) * _dtype(t).itemsize))
    for begin in range(0, count, step):
        end = min(begin + step, count)
        if isinstance(t, FileRows):
            index = torch.arange(begin, end)
            yield t.gather(SparseFeatures(torch.tensor([0, len(index)]), index, index.new_empty(0)))[1]
        else:
            yield (t[begin:end] if t.ndim else t[None]).detach().cpu().contiguous()
