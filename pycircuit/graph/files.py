"""Files that are there whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a new file beside `path`, which then takes its name; a failure leaves `path` as it was."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(fresh)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def writable(op: str, path: str | os.PathLike[str]) -> Path:
    """The path of a file to be; an error where no file can have it."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{op}: path must be in a folder that exists, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{op}: path must be a file, got the folder {path}")
    return path


def picture(op: str, path: str | os.PathLike[str]) -> Path:
    """The same of a drawing."""
    path = writable(op, path)
    if path.suffix.lower() != ".svg":
        raise ValueError(f"{op}: path must end in .svg, got {path}; it is SVG that is written")
    return path


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda fresh: fresh.write_bytes(text.encode()))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, for reading a file of the folder and replacing it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
