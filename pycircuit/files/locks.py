"""Locks on files, which the system releases when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Lock a file, made if need be, that its owner may remove or rename; `waiting` is called if others have it."""
    while True:
        with path.open("ab") as file, _unlocking(file.fileno()):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            if is_still(path, os.fstat(file.fileno())):
                yield
                return


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, to read a file in it and replace it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with _unlocking(descriptor):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
    finally:
        os.close(descriptor)


@contextmanager
def _unlocking(descriptor: int) -> Iterator[None]:
    """Unlock at the end: to close the file is not enough where a child process has inherited it."""
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_still(path: Path, state: os.stat_result) -> bool:
    """True if `path` names the file of this state, and none that took its place."""
    try:
        return os.path.samestat(state, path.stat())
    except FileNotFoundError:
        return False
