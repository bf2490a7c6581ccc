"""Reads of files in use: one loop over positioned reads, files that changed, errors that name the file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_LFS_POINTER = b"version https://git-lfs"  # begins the file that git leaves without its extension for large files
_LFS_POINTER_BYTES = 1024  # such a file is smaller


class FileState(NamedTuple):
    """Size and time of a file when its header was read; one of them differs once the content may."""

    size: int
    time: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        return cls(status.st_size, status.st_mtime_ns)

    def check(self, path: Path, status: os.stat_result) -> None:
        """Raise an error if the file is another one now."""
        if self.of(status) != self:
            raise ValueError(
                f"load: {path} must not change while in use, got {status.st_size} bytes or another time of change "
                f"where there were {self.size}; load it again"
            )


def read_into(
    file: int, buffers: list[memoryview], offset: int, path: str | os.PathLike[str], op: str = "load"
) -> None:
    """Fill buffers, one after another, with what a file holds from a byte offset on; at most 1,024 of them."""
    buffers = [buffer for buffer in buffers if len(buffer)]
    while buffers:  # one read may stop short, and never passes 2 GB
        count = os.preadv(file, buffers, offset)
        if count == 0:
            raise ValueError(f"{op}: {path} must not shrink while in use, got its end at byte {offset}")
        offset += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if buffers:
            buffers[0] = buffers[0][count:]


@contextmanager
def reword_os_errors(path: Path) -> Iterator[None]:
    """Raise errors of the system against a file or a folder in the words of `load`."""
    try:
        yield
    except OSError as error:
        if str(error).startswith("load:"):
            raise
        culprit = Path(error.filename) if isinstance(error.filename, str) else path
        dangling = isinstance(error, FileNotFoundError) and culprit.is_symlink()
        reason = f"{error.strerror or error}{' (a link to nowhere)' * dangling}"
        raise type(error)(f"load: {culprit} must be there and readable, got {reason}") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Refuse what is no regular file before it is opened: to open a pipe would be to wait for ever."""
    with reword_os_errors(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            got = "a folder" if path.is_dir() else "a device or a pipe"
            raise ValueError(f"load: {path} must be a file, got {got}")
        if status.st_size < _LFS_POINTER_BYTES and path.read_bytes().startswith(_LFS_POINTER):
            raise ValueError(f"load: {path} must be the file itself, got git-lfs's pointer to it; run git lfs pull")
        yield
