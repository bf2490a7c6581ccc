"""Weights on the pages of their file, which are read as they are used and let go when they are not."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_MAPS = Path("/proc/self/pagemap")  # one word for each page of this process: Linux alone has it
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_HELD = WeakTensorKeyDictionary()  # the Mapping of each tensor that `mapped` gave


class State(NamedTuple):
    """Of a file when its header was read: what differs once its content may."""

    size: int
    time: int

    @classmethod
    def of(cls, found: os.stat_result) -> State:
        return cls(found.st_size, found.st_mtime_ns)

    def check(self, path: Path, found: os.stat_result) -> None:
        if self.of(found) != self:
            raise ValueError(
                f"load: {path} must not change while in use, got {found.st_size} bytes or another time of change "
                f"where there were {self.size}; load it again"
            )


class Mapping(NamedTuple):
    pages: mmap.mmap
    path: Path
    state: State | None


def mapped(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype, state: State | None = None) -> Tensor:
    """A view of what lies in a file from byte `offset` on, which is a multiple of the entry's size; not empty.

    It may be written to: its pages then become memory of this process, and the file stays as it is. state: of the
    file, which `check` compares with.
    """
    begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    count = torch.Size(shape).numel()
    with path.open("rb") as file:
        if state is not None:
            state.check(path, os.fstat(file.fileno()))
        size = offset - begin + count * dtype.itemsize
        held = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=begin)
    t = torch.frombuffer(held, dtype=dtype, count=count, offset=offset - begin).view(shape)
    _HELD[t] = Mapping(held, path, state)
    return t


def check(t: Tensor) -> None:
    """That the file of a mapped tensor is as it was: to touch a page that it lost would end the process.

    A file that is gone is still there for who has mapped it. One that shrinks between this and the use is not seen.
    """
    held = _HELD.get(t)
    if held is None or held.state is None:
        return
    with suppress(FileNotFoundError):
        held.state.check(held.path, os.stat(held.path))
    if held.pages.size() < held.state.size:
        raise ValueError(
            f"load: {held.path} must not shrink while in use, got {held.pages.size()} bytes; load it again"
        )


def mapped_bytes(t: Tensor) -> int:
    """Bytes of a tensor's file that may become resident; 0 for one in memory of its own."""
    mapping = _HELD.get(t)
    return 0 if mapping is None else len(mapping.pages)


def let_go(t: Tensor) -> None:
    """Count the pages of a mapped tensor to this process no longer; the system has them still, and gives them back
    when they are used. Of one that was written to, and of every other tensor, nothing is let go."""
    held = _HELD.get(t)
    if held is not None and _only_of_file(t, len(held.pages)):
        with suppress(OSError):  # pages that are locked in memory stay
            held.pages.madvise(mmap.MADV_DONTNEED)


def _only_of_file(t: Tensor, size: int) -> bool:
    """Whether every page is the file's own, as far as can be seen: one that was written to exists here alone."""
    if not _MAPS.exists():
        return False
    first = t.data_ptr() // mmap.PAGESIZE  # the page that the mapping begins with
    with _MAPS.open("rb", buffering=0) as file:
        file.seek(8 * first)
        words = np.frombuffer(file.read(8 * -(-size // mmap.PAGESIZE)), dtype=np.uint64)
    own = (words & (_PRESENT | _OF_FILE)) == _PRESENT
    return len(words) > 0 and not bool((own | (words & _SWAPPED != 0)).any())
