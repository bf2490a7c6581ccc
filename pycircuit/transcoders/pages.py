"""Weights on the pages of their file, which are read as they are used and let go when they are not."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_MAPS = Path("/proc/self/pagemap")  # one word for each page of this process: Linux alone has it
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_HELD = WeakTensorKeyDictionary()  # the mapping of each tensor that `mapped` gave


def mapped(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A view of what lies in a file from byte `offset` on, which is a multiple of the entry's size; not empty.

    It may be written to: its pages then become memory of this process, and the file stays as it is.
    """
    begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    count = torch.Size(shape).numel()
    with path.open("rb") as file:
        size = offset - begin + count * dtype.itemsize
        held = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=begin)
    t = torch.frombuffer(held, dtype=dtype, count=count, offset=offset - begin).view(shape)
    _HELD[t] = held
    return t


def let_go(t: Tensor) -> None:
    """Count the pages of a mapped tensor to this process no longer; the system has them still, and gives them back
    when they are used. Of one that was written to, and of every other tensor, nothing is let go."""
    held = _HELD.get(t)
    if held is not None and _only_of_file(t, len(held)):
        with suppress(OSError):  # pages that are locked in memory stay
            held.madvise(mmap.MADV_DONTNEED)


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
