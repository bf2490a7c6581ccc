"""Reader of the archives that torch.save writes, without torch.load: plain values and plain tensors.

Nothing in the file is run, and no more is allocated than the file has: only allowed names resolve, only opcodes that
torch.save writes are executed, and a tensor is read when it is used.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .graph_file import GraphFileError

PICKLE_BYTES = 64 << 20  # values need about fifty times their bytes in memory
_OPCODES = (
    "PROTO STOP MARK GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3"
)
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip


class StandIn:
    """Stand-in for a class of a library: it stores the fields and runs none of the class's code."""

    def __new__(cls, *args: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass


def stand_in(name: str) -> type[StandIn]:
    """Make a stand-in for the class of this dotted name."""
    module, _, last = name.rpartition(".")
    return type(last, (StandIn,), {"__module__": module})


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file describes it; the description may be wrong."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, extra: Any = None
) -> StoredTensor:
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or extra:
        raise pickle.UnpicklingError("a tensor that is not plain")
    return StoredTensor(storage, offset, size, stride)


def _empty_bytes(*args: Any) -> bytes:
    return b""


# Names that every archive may use. Bytes occur only in NumPy's numbers, which are not read.
_ALLOWED: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "collections.OrderedDict": dict,
    "_codecs.encode": _empty_bytes,
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in _STORAGES.values()},
    **{name: stand_in(name) for name in (
        "torch.device", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    )},
}  # fmt: skip

_Unpickler: Any = pickle._Unpickler  # the implementation in Python, whose methods can be overridden


class _Reader(_Unpickler):
    """Unpickler of the values in an archive of torch's."""

    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: _Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()
    }

    def __init__(self, data: bytes, allowed: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(data))
        self.allowed = {**_ALLOWED, **allowed}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"unsupported GLOBAL {module}.{name}")
        return self.allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
            _, dtype, key, _, count = pid
            if isinstance(dtype, torch.dtype) and isinstance(key, str) and type(count) is int and count >= 0:
                return _Storage(dtype, key, count)
        raise pickle.UnpicklingError("a storage that torch.save does not write")

    def load_build(self) -> None:
        state = self.stack.pop()
        owner = self.stack[-1]
        if not isinstance(owner, StandIn):
            raise pickle.UnpicklingError(f"state for {type(owner).__name__}")
        if isinstance(state, dict):
            vars(owner).update(state)

    dispatch[pickle.BUILD[0]] = load_build


class Archive:
    """A file that torch.save wrote. op: the prefix of its errors."""

    def __init__(self, op: str, path: Path) -> None:
        self.op, self.path = op, path
        try:
            with zipfile.ZipFile(path) as archive:
                self.members = self._checked(archive)
                pickles = [name for name in self.members if name.endswith("/data.pkl")]
                self.root = pickles[0].removesuffix("/data.pkl") if len(pickles) == 1 else ""
                self._require(bool(self.root), "hold one data.pkl", f"{len(pickles)}")
                size = self.members[pickles[0]].file_size
                self._require(size <= PICKLE_BYTES, f"hold at most {PICKLE_BYTES} bytes of values", str(size))
                self.data = archive.read(pickles[0])
                order_file = f"{self.root}/byteorder"
                order = archive.read(order_file).decode() if order_file in self.members else sys.byteorder
        except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, UnicodeDecodeError) as error:
            raise GraphFileError(f"{op} must be a whole archive as torch.save writes it, got: {error}") from None
        self._require(order == sys.byteorder, f"be written in this machine's byte order, {sys.byteorder}", order[:20])
        self.bytes = torch.from_numpy(np.memmap(path, np.uint8, "c"))

    def _require(self, holds: bool, rule: str, got: str) -> None:
        if not holds:
            raise GraphFileError(f"{self.op} must {rule}, got {got}")

    def _checked(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        """Files of the archive by name, once they are known to be uncompressed, disjoint and intact."""
        infos = archive.infolist()
        members = {m.filename: m for m in infos}
        compressed = next((m.filename for m in infos if m.compress_type != zipfile.ZIP_STORED), None)
        self._require(compressed is None, "hold its tensors as they are", f"{compressed} compressed")
        total, file_size = sum(m.file_size for m in infos), os.path.getsize(self.path)
        disjoint = total <= file_size and len(members) == len(infos)
        self._require(disjoint, "hold everything once", f"{total} bytes in {file_size}")
        damaged = archive.testzip()
        self._require(damaged is None, "be as it was written", f"{damaged} with another checksum")
        return members

    def values(self, allowed: Mapping[str, Any]) -> Any:
        """Values that were saved, with tensors as `StoredTensor`. allowed: objects by the dotted name in the file."""
        try:
            return _Reader(self.data, allowed).load()
        except Exception as error:  # whatever a damaged or hostile pickle leads to
            got = f"{type(error).__name__}: {str(error)[:300]}"
            raise GraphFileError(f"{self.op} must hold plain values and tensors, got {got}") from None

    def tensor(self, name: str, stored: StoredTensor) -> Tensor:
        """Map a stored tensor from the file, which must outlive it."""
        storage, itemsize = stored.storage, stored.storage.dtype.itemsize
        member = self.members.get(f"{self.root}/data/{storage.key}")
        if member is None or member.file_size != storage.count * itemsize:
            raise ValueError(f"{name} must lie in the file whole, got {member and member.file_size} bytes of it")
        count, last = 1, stored.offset
        for n, step in zip(stored.size, stored.stride, strict=True):
            count, last = count * n, last + (n - 1) * step
        if count > storage.count or (count and last >= storage.count):
            raise ValueError(f"{name} must lie in the file, got shape {list(stored.size)}")
        if not count:
            return torch.empty(stored.size, dtype=storage.dtype)
        begin = self._data_offset(member)
        content = self.bytes[begin : begin + member.file_size]
        content = (content.clone() if begin % itemsize else content).view(storage.dtype)
        return content.as_strided(stored.size, stored.stride, content.storage_offset() + stored.offset)

    def _data_offset(self, member: zipfile.ZipInfo) -> int:
        """Offset of a member's bytes, which follow a header with a name and an extra field."""
        offset = member.header_offset
        name, extra = struct.unpack("<HH", self.bytes[offset + 26 : offset + 30].numpy().tobytes())
        return offset + 30 + int(name) + int(extra)
