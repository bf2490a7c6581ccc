"""Folders of safetensors files that are there whole or not at all, written a few rows at a time."""

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

from pycircuit.files.atomic import naming, write_atomically
from pycircuit.files.locks import is_still
from pycircuit.files.safetensors import write_tensors
from pycircuit.ops import FileRows

from .files import KINDS

_KEY = "resume.json"


def write_safetensors(path: Path, tensors: dict[str, Tensor | FileRows]) -> None:
    """Write a file of floating-point tensors."""
    for name, t in tensors.items():
        if t.dtype not in KINDS.values():
            raise TypeError(f"save: {name} must be one of {', '.join(KINDS)}, got {t.dtype}")
    write_atomically(path, lambda file: write_tensors(file, tensors))


def destination(op: str, path: str | os.PathLike[str]) -> Path:
    """A folder to be, which must not be there yet."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise FileExistsError(f"{op}: path must be a new folder, got {path}, which exists; remove it or name another")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{op}: path must be in a folder that exists, got {path}")
    return path


@contextmanager
def draft_of(op: str, path: Path, key: dict[str, Any] | None) -> Iterator[Path]:
    """A hidden folder beside `path` that takes its name in the end. key: kept after a failure, to go on from there."""
    draft = path.absolute().with_name(f".{path.name}.{'resume' if key else 'new'}.draft")
    with naming(op, path, "; the same call goes on where this one stopped" if key else ""):
        draft.mkdir(exist_ok=True)
        handle = os.open(draft, os.O_RDONLY)
        try:
            _take(op, path, draft, handle)
            _begin(draft, key)
            try:
                yield draft
                _end(draft, handle)
                draft.rename(path)
            except BaseException:
                if not key:
                    shutil.rmtree(draft, ignore_errors=True)
                raise
        finally:
            os.close(handle)


def _take(op: str, path: Path, draft: Path, handle: int) -> None:
    """The draft is ours alone; another may have had it, and moved it away, just now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = is_still(draft, os.fstat(handle))
    except BlockingIOError:
        ours = False
    if not ours:
        raise BlockingIOError(f"{op}: {path} must be written by one process at a time, got another at it")


def _begin(draft: Path, key: dict[str, Any] | None) -> None:
    """Empty, but for what a broken run with the same key has left."""
    held, said = draft / _KEY, json.dumps(key, sort_keys=True)
    if not (key and held.is_file() and held.read_text() == said):
        for entry in draft.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    if key:
        held.write_text(said)


def _end(draft: Path, handle: int) -> None:
    """Everything on the disk, before anybody can find it under its name."""
    (draft / _KEY).unlink(missing_ok=True)
    for folder in (entry for entry in draft.iterdir() if entry.is_dir()):
        _flush(folder)
    os.fsync(handle)


def _flush(path: Path) -> None:
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def write_folder(
    op: str,
    path: Path,
    files: Iterable[tuple[str, dict[str, Any]]],
    texts: dict[str, str],
    key: dict[str, Any] | None = None,
) -> None:
    """files: (name, tensors), one at a time; texts: what says how to read them, written last.

    key: what the files are made of. Those that a broken run with the same key has written are left as they are.
    """
    with draft_of(op, path, key) as draft:
        for name, tensors in files:
            target = draft / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (key and target.exists()):
                write_safetensors(target, tensors)
        for name, text in texts.items():
            (draft / name).write_bytes(text.encode())
            _flush(draft / name)
