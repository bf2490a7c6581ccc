"""What torch.save writes, read without torch.load: plain values and plain tensors.

Nothing of the file is run, and nothing is allocated that it does not hold: names stand for what a reader says they
stand for, opcodes are those that torch.save writes, and tensors are read only where they are asked for.
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

PICKLE_BYTES = 64 << 20  # values take some fifty times their bytes in memory
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


class Standin:
    """What a class of a library becomes: its values are kept, none of its code is run or needed."""

    def __new__(cls, *args: Any) -> Standin:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass


def standin(name: str) -> type[Standin]:
    module, _, last = name.rpartition(".")
    return type(last, (Standin,), {"__module__": module})


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class Stored:
    """A tensor as the file describes it, which may be a lie."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuilt(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, extra: Any = None) -> Stored:
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or extra:
        raise pickle.UnpicklingError("a tensor that is not plain")
    return Stored(storage, offset, size, stride)


def _no_bytes(*args: Any) -> bytes:
    return b""


# Beside what the reader knows. Bytes occur in NumPy's numbers alone, which are not looked at.
_KNOWN: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "collections.OrderedDict": dict,
    "_codecs.encode": _no_bytes,
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{str(dtype): dtype for dtype in _STORAGES.values()},
    **{name: standin(name) for name in (
        "torch.device", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    )},
}  # fmt: skip

_Unpickler: Any = pickle._Unpickler  # the one in Python, whose parts can be replaced


class _Reader(_Unpickler):
    """Values of a pickle of torch's."""

    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: _Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()
    }

    def __init__(self, data: bytes, known: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(data))
        self.known = {**_KNOWN, **known}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.known:
            raise pickle.UnpicklingError(f"unsupported GLOBAL {module}.{name}")
        return self.known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
            _, dtype, key, _, count = pid
            if isinstance(dtype, torch.dtype) and isinstance(key, str) and type(count) is int and count >= 0:
                return _Storage(dtype, key, count)
        raise pickle.UnpicklingError("a storage that torch.save does not write")

    def load_build(self) -> None:
        state = self.stack.pop()
        owner = self.stack[-1]
        if not isinstance(owner, Standin):
            raise pickle.UnpicklingError(f"state for {type(owner).__name__}")
        if isinstance(state, dict):
            vars(owner).update(state)

    dispatch[pickle.BUILD[0]] = load_build


class Archive:
    """A file that torch.save wrote. op: what errors begin with."""

    def __init__(self, op: str, path: Path) -> None:
        self.op, self.path = op, path
        try:
            with zipfile.ZipFile(path) as archive:
                self.members = self._checked(archive)
                pickles = [name for name in self.members if name.endswith("/data.pkl")]
                self.root = pickles[0].removesuffix("/data.pkl") if len(pickles) == 1 else ""
                self._needs(bool(self.root), "hold one data.pkl", f"{len(pickles)}")
                size = self.members[pickles[0]].file_size
                self._needs(size <= PICKLE_BYTES, f"hold at most {PICKLE_BYTES} bytes of values", str(size))
                self.data, order = archive.read(pickles[0]), f"{self.root}/byteorder"
                order = archive.read(order).decode() if order in self.members else sys.byteorder
        except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, UnicodeDecodeError) as error:
            raise GraphFileError(f"{op} must be a whole archive as torch.save writes it, got: {error}") from None
        self._needs(order == sys.byteorder, f"be written in this machine's byte order, {sys.byteorder}", order[:20])
        self.bytes = torch.from_numpy(np.memmap(path, np.uint8, "c"))

    def _needs(self, there: bool, rule: str, got: str) -> None:
        if not there:
            raise GraphFileError(f"{self.op} must {rule}, got {got}")

    def _checked(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        """Its files by name, each as it is, in a place of its own and with its checksum."""
        every = archive.infolist()
        found = {m.filename: m for m in every}
        packed = next((m.filename for m in every if m.compress_type != zipfile.ZIP_STORED), None)
        self._needs(packed is None, "hold its tensors as they are", f"{packed} compressed")
        total, whole = sum(m.file_size for m in every), os.path.getsize(self.path)
        self._needs(total <= whole and len(found) == len(every), "hold everything once", f"{total} bytes in {whole}")
        broken = archive.testzip()
        self._needs(broken is None, "be as it was written", f"{broken} with another checksum")
        return found

    def values(self, known: Mapping[str, Any]) -> Any:
        """What was saved, tensors as `Stored`. known: what names of other modules stand for."""
        try:
            return _Reader(self.data, known).load()
        except Exception as error:  # whatever a damaged or hostile pickle leads to
            kind, said = type(error).__name__, str(error)[:300]
            raise GraphFileError(f"{self.op} must hold plain values and tensors, got {kind}: {said}") from None

    def tensor(self, name: str, of: Stored) -> Tensor:
        """On the file's pages, which must outlive it."""
        storage, wide = of.storage, of.storage.dtype.itemsize
        member = self.members.get(f"{self.root}/data/{storage.key}")
        if member is None or member.file_size != storage.count * wide:
            raise ValueError(f"{name} must lie in the file whole, got {member and member.file_size} bytes of it")
        count, last = 1, of.offset
        for n, step in zip(of.size, of.stride, strict=True):
            count, last = count * n, last + (n - 1) * step
        if count > storage.count or (count and last >= storage.count):
            raise ValueError(f"{name} must lie in the file, got shape {list(of.size)}")
        if not count:
            return torch.empty(of.size, dtype=storage.dtype)
        begin = self._begin(member)
        held = self.bytes[begin : begin + member.file_size]
        held = (held.clone() if begin % wide else held).view(storage.dtype)
        return held.as_strided(of.size, of.stride, held.storage_offset() + of.offset)

    def _begin(self, member: zipfile.ZipInfo) -> int:
        """Where its bytes are: behind a header with a name and an extra field."""
        at = member.header_offset
        name, extra = struct.unpack("<HH", self.bytes[at + 26 : at + 30].numpy().tobytes())
        return at + 30 + int(name) + int(extra)
