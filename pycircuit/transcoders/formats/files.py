"""Tensors in files, found without being read: safetensors (sharded or not). Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pycircuit.ops.file_rows import entries
from pycircuit.transcoders import resident_pages
from pycircuit.transcoders.resident_pages import State

KINDS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_CHUNK = 32 << 20  # bytes read at a time
_POINTER, _LONGEST_POINTER = b"version https://git-lfs", 1024  # what git leaves of a large file without its extension
_YAML = 128 << 10  # bytes; of a hundred layers' locations there are ten times less, and reading them is slow


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, row by row from byte `offset` on, not read yet. stride: bytes from one row to the next.

    state: of the file when this was found; one that is changed since is not read.
    """

    path: Path
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: int
    checksum: tuple[int, int] | None = None  # CRC-32 of what comes before it in an archive, and with it
    state: State | None = None

    @classmethod
    def whole(
        cls, path: Path, name: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype, state: State | None = None
    ) -> Stored:
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

    def entry(self, at: int) -> Stored:
        """One entry of the first dimension."""
        return self.whole(self.path, self.name, self.offset + at * self.stride, self.shape[1:], self.dtype, self.state)

    def slots(self, begin: int) -> Stored:
        """[:, begin:]"""
        inner = prod(self.shape[2:]) * self.dtype.itemsize
        return replace(
            self, offset=self.offset + begin * inner, shape=(self.shape[0], self.shape[1] - begin, *self.shape[2:])
        )

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows begin .. end, in memory of their own."""
        out = torch.empty(end - begin, *self.shape[1:], dtype=self.dtype)
        into = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            if self.state is not None:
                self.state.check(self.path, os.fstat(file.fileno()))
            if self.contiguous:
                read_at(file.fileno(), into, self.offset + begin * self.stride, self.path)
            else:
                for at in range(end - begin):
                    part = into[at * self.row_bytes : (at + 1) * self.row_bytes]
                    read_at(file.fileno(), part, self.offset + (begin + at) * self.stride, self.path)
        return out

    def read(self) -> Tensor:
        """All of it, in memory of its own."""
        if not self.shape:
            return replace(self, shape=(1,), stride=self.dtype.itemsize).read()[0]
        return self._whole(self.rows(0, self.shape[0]))

    def _whole(self, t: Tensor) -> Tensor:
        """The tensor, if it is what its archive says it is."""
        if self.checksum is not None and t.numel():
            found = zlib.crc32(t.view(-1).view(torch.uint8).numpy().data, self.checksum[0])
            if found != self.checksum[1]:
                raise ValueError(f"load: {self} must have the checksum {self.checksum[1]:08x}, got {found:08x}")
        return t

    def chunks(self, bytes_each: int = _CHUNK) -> Iterator[Tensor]:
        """All of it in order, some rows at a time."""
        step = max(1, bytes_each // max(1, self.row_bytes))
        for begin in range(0, self.shape[0], step):
            yield self.rows(begin, min(begin + step, self.shape[0]))

    def mapped(self) -> Tensor:
        """A view of the file: pages are read as they are used, and `pages.let_go` drops them again."""
        if not self.contiguous or self.offset % self.dtype.itemsize or not self.bytes:
            return self.read()
        with reading(self.path):
            return self._whole(resident_pages.mapped(self.path, self.offset, self.shape, self.dtype, self.state))


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """What the system says against a file or a folder, in our words."""
    try:
        yield
    except OSError as error:
        if str(error).startswith("load:"):
            raise
        where = Path(error.filename) if isinstance(error.filename, str) else path
        linked = " (a link to nowhere)" if isinstance(error, FileNotFoundError) and where.is_symlink() else ""
        said = f"{error.strerror or error}{linked}"
        raise type(error)(f"load: {where} must be there and readable, got {said}") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Only of a file: to open a pipe would be to wait for ever."""
    with telling(path):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            got = "a folder" if path.is_dir() else "a device or a pipe"
            raise ValueError(f"load: {path} must be a file, got {got}")
        if found.st_size < _LONGEST_POINTER and path.read_bytes().startswith(_POINTER):
            raise ValueError(f"load: {path} must be the file itself, got git-lfs's pointer to it; run git lfs pull")
        yield


def read_at(file: int, into: memoryview, at: int, path: Path) -> None:
    while into:  # one read may stop short, and never passes 2 GB
        count = os.preadv(file, [into], at)
        if count == 0:
            raise ValueError(f"load: {path} must not shrink while in use, got its end at byte {at}")
        into, at = into[count:], at + count


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, by name."""
    try:
        with reading(path):
            state, found = State.of(path.stat()), entries(path)
    except ValueError as error:
        raise ValueError(str(error).replace("FileRows:", "load:", 1)) from None
    return {name: _typed(path, state, name, *entry) for name, entry in found.items()}


def _typed(path: Path, state: State, name: str, offset: int, shape: tuple[int, ...], kind: str) -> Stored:
    if kind not in KINDS:
        raise TypeError(f"load: {path}: {name} must be one of {', '.join(KINDS)}, got {kind}")
    return Stored.whole(path, name, offset, shape, KINDS[kind], state)


def open_tensors(path: Path) -> dict[str, Stored]:
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


def _sharded(index: Path) -> dict[str, Stored]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise ValueError(f"load: {index} must have a weight_map of tensors to files, got {type(where).__name__}")
    opened = {name: open_safetensors(inside(index.parent, name, index)) for name in sorted(set(where.values()))}
    missing = [name for name, file in where.items() if name not in opened[file]]
    if missing:
        raise ValueError(f"load: {index.parent / where[missing[0]]} must hold {missing[0]} as {index.name} says")
    for file, held in opened.items():
        for name in held:
            if where.get(name) != file:
                raise ValueError(f"load: {index} must name every tensor of {file}, got none of {name}")
    return {name: opened[file][name] for name, file in where.items()}


def inside(folder: Path, name: str, said_by: Path) -> Path:
    """A file that a configuration names, which must lie in the folder."""
    parts = Path(name).parts
    if not name or Path(name).is_absolute() or ".." in parts or "\x00" in name:
        raise ValueError(f"load: {said_by} must name files inside its folder, got {name!r}")
    path = folder / name
    try:
        there = path.is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        raise FileNotFoundError(f"load: {said_by} names {name[:200]}, which must be in {folder}, got no such file")
    return path


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def read_text(path: Path, most: int = 16 << 20) -> str:
    try:
        with reading(path):
            size = path.stat().st_size
            if size > most:
                raise ValueError(f"load: {path} must be a configuration of at most {most} bytes, got {size}")
            return path.read_text("utf-8-sig")  # Windows puts a mark before it
    except UnicodeDecodeError as error:
        raise ValueError(f"load: {path} must be text, got {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("load:"):
            raise
        raise ValueError(f"load: {path} must be JSON, got {error}") from None
    return _mapping(path, found)


def read_yaml(path: Path) -> dict[str, Any]:
    """Plain YAML: no tags, no anchors, no name twice."""
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias, which can stand for more than fits into memory")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            if len({str(key) for key in keys}) != len(keys):
                raise yaml.YAMLError("a name twice")
            found = super().construct_mapping(node, deep)
            if len(found) != len(node.value):
                raise yaml.YAMLError("a name twice, in two ways of writing it")
            return found

    try:
        found = yaml.load(read_text(path, _YAML), Plain)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        if str(error).startswith("load:"):
            raise
        raise ValueError(f"load: {path} must be plain YAML, got {' '.join(str(error).split())}") from None
    return _mapping(path, found)


def _mapping(path: Path, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"load: {path} must hold names and values, got {type(found).__name__}")
    return found
