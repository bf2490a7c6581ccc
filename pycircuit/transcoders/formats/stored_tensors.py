"""Tensors in files, opened without being read: safetensors, sharded or not. Nothing is ever unpickled."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pycircuit.files.memory_maps import map_tensor
from pycircuit.files.reading import FileState, read_into, reading
from pycircuit.files.safetensors import FLOATS, TensorEntry, tensor_entries

from .config_files import path_inside, read_json

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_CHUNK = 32 << 20  # bytes read at a time


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, row by row from byte `offset` on, not read yet. stride: bytes from one row to the next.

    state: of the file when this was opened; one that is changed since is not read.
    """

    path: Path
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: int
    checksum: tuple[int, int] | None = None  # CRC-32 of what comes before it in an archive, and with it
    state: FileState | None = None

    @classmethod
    def packed(
        cls,
        path: Path,
        name: str,
        offset: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        state: FileState | None = None,
    ) -> StoredTensor:
        """A tensor whose rows follow each other without gaps."""
        return cls(path, name, offset, shape, dtype, prod(shape[1:]) * dtype.itemsize, state=state)

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        return self.stride == self.row_bytes

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def entry(self, index: int) -> StoredTensor:
        """One entry of the first dimension."""
        offset = self.offset + index * self.stride
        return self.packed(self.path, self.name, offset, self.shape[1:], self.dtype, self.state)

    def slots(self, begin: int) -> StoredTensor:
        """[:, begin:]"""
        inner = prod(self.shape[2:]) * self.dtype.itemsize
        return replace(
            self, offset=self.offset + begin * inner, shape=(self.shape[0], self.shape[1] - begin, *self.shape[2:])
        )

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows begin .. end, in memory of their own."""
        out = torch.empty(end - begin, *self.shape[1:], dtype=self.dtype)
        buffer = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            descriptor = file.fileno()
            if self.state is not None:
                self.state.check(self.path, os.fstat(descriptor))
            if self.contiguous:
                read_into(descriptor, [buffer], self.offset + begin * self.stride, self.path)
            else:
                for i in range(end - begin):
                    row = buffer[i * self.row_bytes : (i + 1) * self.row_bytes]
                    read_into(descriptor, [row], self.offset + (begin + i) * self.stride, self.path)
        return out

    def read(self) -> Tensor:
        """The complete tensor, in memory of its own."""
        if not self.shape:
            return replace(self, shape=(1,), stride=self.dtype.itemsize).read()[0]
        return self._verified(self.rows(0, self.shape[0]))

    def _verified(self, t: Tensor) -> Tensor:
        """The tensor, if its checksum is the archive's."""
        if self.checksum is not None and t.numel():
            checksum = zlib.crc32(t.view(-1).view(torch.uint8).numpy().data, self.checksum[0])
            if checksum != self.checksum[1]:
                raise ValueError(f"load: {self} must have the checksum {self.checksum[1]:08x}, got {checksum:08x}")
        return t

    def chunks(self, chunk_bytes: int = _CHUNK) -> Iterator[Tensor]:
        """All rows in order, a chunk at a time."""
        step = max(1, chunk_bytes // max(1, self.row_bytes))
        for begin in range(0, self.shape[0], step):
            yield self.rows(begin, min(begin + step, self.shape[0]))

    def mapped(self) -> Tensor:
        """View of the file: pages are read as they are used, and `drop_resident_pages` drops them again."""
        if not self.contiguous or self.offset % self.dtype.itemsize or not self.bytes:
            return self.read()
        with reading(self.path):
            return self._verified(map_tensor(self.path, self.offset, self.shape, self.dtype, self.state))


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by name."""
    with reading(path):
        state, entries = FileState.of(path.stat()), tensor_entries(path)
    return {name: _float_tensor(path, state, name, entry) for name, entry in entries.items()}


def _float_tensor(path: Path, state: FileState, name: str, entry: TensorEntry) -> StoredTensor:
    if entry.kind not in FLOATS:
        raise TypeError(f"load: {path}: {name} must be one of {', '.join(FLOATS)}, got {entry.kind}")
    return StoredTensor.packed(path, name, entry.offset, entry.shape, FLOATS[entry.kind], state)


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file by name, or of the files a `*.safetensors.index.json` beside it names."""
    index = path.with_name(path.name + ".index.json")
    if path.suffix in PICKLES:
        raise ValueError(
            f"load: {path} must not be a pickle, which can run anything when it is opened; "
            "save the tensors as safetensors with the library that made it"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"load: {path} must be a .safetensors file, got {path.suffix!r}")
    return _sharded(index) if not path.exists() and index.exists() else open_safetensors(path)


def _sharded(index: Path) -> dict[str, StoredTensor]:
    """Tensors of the files that an index names."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
        raise ValueError(f"load: {index} must have a weight_map of tensors to files, got {type(files).__name__}")
    opened = {file: open_safetensors(path_inside(index.parent, file, index)) for file in sorted(set(files.values()))}
    missing = [name for name, file in files.items() if name not in opened[file]]
    if missing:
        raise ValueError(f"load: {index.parent / files[missing[0]]} must hold {missing[0]} as {index.name} says")
    for file, tensors in opened.items():
        for name in tensors:
            if files.get(name) != file:
                raise ValueError(f"load: {index} must name every tensor of {file}, got none of {name}")
    return {name: opened[file][name] for name, file in files.items()}
