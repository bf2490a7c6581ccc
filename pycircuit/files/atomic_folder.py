"""Folders of safetensors files that readers see complete or not at all, written a few rows at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .atomic import reword_write_errors, write_atomically
from .locks import is_still
from .safetensors import FLOATS, RowSource, write_tensors

_KEY = "resume.json"  # tells what the files of a broken run were made of


def write_safetensors(path: Path, tensors: dict[str, Tensor | RowSource]) -> None:
    """Write a safetensors file of floating-point tensors."""
    for name, t in tensors.items():
        if t.dtype not in FLOATS.values():
            raise TypeError(f"save: {name} must be one of {', '.join(FLOATS)}, got {t.dtype}")
    write_atomically(path, lambda file: write_tensors(file, tensors))


def new_folder(op: str, path: str | os.PathLike[str]) -> Path:
    """Path of a folder to be, which must not be there yet."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise FileExistsError(f"{op}: path must be a new folder, got {path}, which exists; remove it or name another")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{op}: path must be in a folder that exists, got {path}")
    return path


@contextmanager
def draft_folder(op: str, path: Path, key: dict[str, Any] | None) -> Iterator[Path]:
    """Hidden folder beside `path` that takes its name in the end. key: the draft stays after a failure, to go on."""
    draft = path.absolute().with_name(f".{path.name}.{'resume' if key else 'new'}.draft")
    with reword_write_errors(op, path, "; the same call goes on where this one stopped" if key else ""):
        draft.mkdir(exist_ok=True)
        descriptor = os.open(draft, os.O_RDONLY)
        try:
            _lock(op, path, draft, descriptor)
            _clear(draft, key)
            try:
                yield draft
                _flush_all(draft, descriptor)
                draft.rename(path)
            except BaseException:
                if not key:
                    shutil.rmtree(draft, ignore_errors=True)
                raise
        finally:
            os.close(descriptor)


def _lock(op: str, path: Path, draft: Path, descriptor: int) -> None:
    """Lock the draft for this process; another may have had it, and moved it away, just now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = is_still(draft, os.fstat(descriptor))
    except BlockingIOError:
        locked = False
    if not locked:
        raise BlockingIOError(f"{op}: {path} must be written by one process at a time, got another at it")


def _clear(draft: Path, key: dict[str, Any] | None) -> None:
    """Remove all but what a broken run with the same key has left."""
    key_file, text = draft / _KEY, json.dumps(key, sort_keys=True)
    if not (key and key_file.is_file() and key_file.read_text() == text):
        for entry in draft.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    if key:
        key_file.write_text(text)


def _flush_all(draft: Path, descriptor: int) -> None:
    """Flush everything to the disk, before anybody can find it under its name."""
    (draft / _KEY).unlink(missing_ok=True)
    for entry in draft.rglob("*"):
        _flush(entry)
    os.fsync(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_folder(
    op: str,
    path: Path,
    files: Iterable[tuple[str, dict[str, Any]]],
    texts: dict[str, str],
    key: dict[str, Any] | None = None,
) -> None:
    """Write a folder of safetensors files and texts.

    files: (name, tensors), one at a time; texts: configurations, written last. key: what the files are made of; those
    that a broken run with the same key has written are left as they are.
    """
    with draft_folder(op, path, key) as draft:
        for name, tensors in files:
            target = draft / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (key and target.exists()):
                write_safetensors(target, tensors)
        for name, text in texts.items():
            (draft / name).write_bytes(text.encode())
