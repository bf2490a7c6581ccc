"""Folders of safetensors files that are there whole or not at all, written a few rows at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pycircuit.ops import Features, FileRows

from .cache import is_still
from .files import KINDS, safetensors_header

_CHUNK = 32 << 20  # bytes held at a time
_KEY = "resume.json"


def _dtype(t: Tensor | FileRows) -> torch.dtype:
    return t.dtype


def _chunks(t: Tensor | FileRows) -> Iterator[Tensor]:
    """All rows in order, some at a time, on the CPU."""
    count = t.shape[0] if len(t.shape) else 1
    step = max(1, _CHUNK // max(1, prod(t.shape[1:]) * _dtype(t).itemsize))
    for begin in range(0, count, step):
        end = min(begin + step, count)
        if isinstance(t, FileRows):
            index = torch.arange(begin, end)
            yield t.gather(Features(torch.tensor([0, len(index)]), index, index.new_empty(0)))[1]
        else:
            yield (t[begin:end] if t.ndim else t[None]).detach().cpu().contiguous()


def write_safetensors(path: Path, tensors: dict[str, Tensor | FileRows]) -> None:
    """Widest types first, so that every tensor lies on a multiple of its own size."""
    ordered = sorted(tensors.items(), key=lambda item: (-_dtype(item[1]).itemsize, item[0]))
    for name, t in ordered:
        if _dtype(t) not in KINDS.values():
            raise TypeError(f"save: {name} must be one of {', '.join(KINDS)}, got {_dtype(t)}")
    header = safetensors_header({name: (_dtype(t), tuple(t.shape)) for name, t in ordered})
    fresh = path.with_name(f"{path.name}.partial")
    try:
        with fresh.open("wb") as file:
            file.write(header)
            for _, t in ordered:
                _write(file, t)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _write(file: BinaryIO, t: Tensor | FileRows) -> None:
    for chunk in _chunks(t):
        file.write(memoryview(chunk.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


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
    draft = path.absolute().with_name(f".{path.name}.{'resume' if key else os.getpid()}.draft")
    with _telling(op, path, key is not None):
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


@contextmanager
def _telling(op: str, path: Path, resumes: bool) -> Iterator[None]:
    """What the system says against writing, in our words."""
    try:
        yield
    except OSError as error:
        if str(error).startswith(("load:", f"{op}:")):
            raise
        again = "; the same call goes on where this one stopped" if resumes else ""
        raise type(error)(f"{op}: {path} must be possible to write, got {error.strerror or error}{again}") from None


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
