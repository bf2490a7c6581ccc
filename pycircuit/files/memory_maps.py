"""Tensors on the pages of their file, which are read as they are used and dropped when they are not."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .reading import FileState

_MAPPINGS = WeakTensorKeyDictionary()  # the Mapping of each tensor that `map_tensor` returned


class Mapping(NamedTuple):
    """Pages that a tensor views, the file they are of, and the tensor's version while it holds the file's numbers."""

    pages: mmap.mmap
    path: Path
    state: FileState | None
    version: int


def map_tensor(
    path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype, state: FileState | None = None
) -> Tensor:
    """View of a file from byte `offset` on, which is a multiple of the entry's size; not empty.

    It may be written to: its pages then become memory of this process, and the file stays as it is. Only writes that
    torch counts are kept for good; one through `.data` or NumPy is lost when the pages are dropped. state: of the file,
    which `check_unchanged` compares with.
    """
    begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    entries = torch.Size(shape).numel()
    with path.open("rb") as file:
        if state is not None:
            state.check(path, os.fstat(file.fileno()))
        size = offset - begin + entries * dtype.itemsize
        pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=begin)
    with torch.inference_mode(False):  # torch counts no writes to tensors that are made in inference mode
        t = torch.frombuffer(pages, dtype=dtype, count=entries, offset=offset - begin).view(shape)
    _MAPPINGS[t] = Mapping(pages, path, state, t._version)
    return t


def check_unchanged(t: Tensor) -> None:
    """Raise an error unless the file of a mapped tensor is as it was: to touch a page it lost would end the process.

    A file that is gone is still there for who has mapped it. One that shrinks between this and the use is not seen.
    """
    mapping = _MAPPINGS.get(t)
    if mapping is None or mapping.state is None:
        return
    with suppress(FileNotFoundError):
        mapping.state.check(mapping.path, os.stat(mapping.path))
    if mapping.pages.size() < mapping.state.size:
        raise ValueError(
            f"load: {mapping.path} must not shrink while in use, got {mapping.pages.size()} bytes; load it again"
        )


def mapped_bytes(t: Tensor) -> int:
    """Bytes of a tensor's file that may become resident; 0 for a tensor in memory of its own."""
    mapping = _MAPPINGS.get(t)
    return 0 if mapping is None else len(mapping.pages)


def drop_resident_pages(t: Tensor) -> None:
    """Count the pages of a mapped tensor to this process no longer.

    The system has them still, and gives them back when they are used. A tensor that was written to, and one without a
    file, stays as it is.
    """
    mapping = _MAPPINGS.get(t)
    if mapping is not None and t._version == mapping.version:
        with suppress(OSError):  # pages that are locked in memory stay
            mapping.pages.madvise(mmap.MADV_DONTNEED)
