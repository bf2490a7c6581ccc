"""Files that readers see complete or not at all, whoever else writes them and whatever stops the writer."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .locks import is_still


def replace_file(op: str, path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically. op: what errors begin with."""
    with reword_write_errors(op, path):
        write_atomically(path, write)


def write_text(op: str, path: Path, text: str) -> None:
    """Replace a file with a text in UTF-8."""
    replace_file(op, path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Give `path` the bytes that `write` puts into a new file; a failure leaves `path` as it was.

    Every writer has a file of its own, and the last to finish wins.
    """
    _remove_abandoned(path)
    draft, file = _open_draft(path)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _open_draft(path: Path) -> tuple[Path, BinaryIO]:
    """Hidden file beside `path`; its lock, where the file system has locks, says that its writer is alive."""
    while True:
        draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
        file = draft.open("xb")
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if is_still(draft, os.fstat(file.fileno())):
            return draft, file
        file.close()  # another writer took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Remove the drafts of `path` whose writers are dead, as far as this user may."""
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(f".{path.name}.") and name.endswith(".partial"):
                with suppress(OSError), path.with_name(name).open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.with_name(name).unlink()


@contextmanager
def reword_write_errors(op: str, path: Path, advice: str = "") -> Iterator[None]:
    """Raise errors of the system against writing with the function and the path in them; `errno` stays."""
    try:
        yield
    except OSError as error:
        if str(error).startswith(f"{op}:"):
            raise
        reason = error.strerror or error
        renamed = type(error)(f"{op}: {path} must be possible to write, got {reason}{advice}")
        renamed.errno = error.errno
        raise renamed from None


def writable(op: str, path: str | os.PathLike[str]) -> Path:
    """Path of a file to be; an error where no file can have it."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{op}: path must be in a folder that exists, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{op}: path must be a file, got the folder {path}")
    return path


def writable_svg(op: str, path: str | os.PathLike[str]) -> Path:
    """Path of an SVG drawing to be."""
    path = writable(op, path)
    if path.suffix.lower() != ".svg":
        raise ValueError(f"{op}: path must end in .svg, got {path}; it is SVG that is written")
    return path
