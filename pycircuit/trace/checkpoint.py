"""Checkpoints of a trace: its rows on disk, tile by tile, so that a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pycircuit.files.atomic import replace_file, reword_write_errors, write_text
from pycircuit.files.locks import exclusive
from pycircuit.files.safetensors import write_tensors
from pycircuit.progress import Progress

from .row_store import PackedRows

_RUN, _LOCK = "run.json", "run.lock"
_ROWS = re.compile(r"rows-\d{9}\.safetensors")
_DRAFT = re.compile(rf"\.({re.escape(_RUN)}|{_ROWS.pattern})\.\w+\.partial")
_ARRAYS = ("lengths", "column", "weight", "dropped", "mass")


class CheckpointError(ValueError):
    """The folder holds another run, or a file in it is damaged; the message says which."""


def digest(*groups: Tensor | Sequence[Tensor]) -> str:
    """Return the SHA-256 of the types, shapes and exact bits of tensors."""
    sha = hashlib.sha256()
    for group in groups:
        for t in [group] if isinstance(group, Tensor) else group:
            sha.update(f"{t.dtype}{list(t.shape)}".encode())
            sha.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


@contextmanager
def reserved(folder: str | os.PathLike[str] | None, progress: Progress) -> Iterator[None]:
    """Reserve a folder of rows for one run: others wait until it ends, however it ends."""
    with ExitStack() as stack:
        if folder is not None:
            path = Path(folder)
            if path.exists() and not path.is_dir():
                raise CheckpointError(f"attribute: checkpoint must be a folder, got the file {path}")
            with reword_write_errors("attribute", path):
                path.mkdir(parents=True, exist_ok=True)
                _refuse_foreign_files(path)
                stack.enter_context(exclusive(path / _LOCK, lambda: _wait(path, progress)))
        yield


def _wait(folder: Path, progress: Progress) -> None:
    progress.say(f"checkpoint: another run has {folder}; this one waits until it ends")
    progress.step("waiting", 0, 1, "runs")


def _refuse_foreign_files(folder: Path) -> None:
    """Raise if a folder without a run has files of other kinds, which must not be mixed with a checkpoint's."""
    names = {entry.name for entry in folder.iterdir()}
    foreign = sorted(n for n in names - {_RUN, _LOCK} if not _ROWS.fullmatch(n) and not _DRAFT.fullmatch(n))
    if foreign and _RUN not in names:
        raise CheckpointError(
            f"attribute: checkpoint must be an empty folder or one of an earlier run, got {folder} with other files in "
            f"it, such as {foreign[0]}"
        )


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the run that a folder's run.json describes; None where there is none."""
    path = folder / _RUN
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_bytes())
        intact = run.pop("digest") == _digest_of(run)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"attribute: checkpoint must hold a readable run.json, got {path}: {error}; remove {folder}"
        ) from None
    if not intact:
        raise CheckpointError(
            f"attribute: checkpoint must hold run.json as it was written, got {path} with another digest; "
            f"remove {folder}"
        )
    return dict(run)


def _digest_of(run: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


class Checkpoint:
    """A reserved folder: run.json, which describes the run, and a file for every tile, named by its first row.

    Every file has a digest; a tile also has that of its run.json, and the nodes of its rows. `run`: the run in the
    folder, which is this one except for `plan`, as that depends on the memory that was free.
    """

    def __init__(self, folder: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        names = sorted(entry.name for entry in self.folder.iterdir())
        for draft in filter(_DRAFT.fullmatch, names):  # of runs that were killed: none that is alive has the folder
            (self.folder / draft).unlink()
        stored = read_run(self.folder)
        if stored is None:
            if rows := list(filter(_ROWS.fullmatch, names)):
                raise CheckpointError(
                    f"attribute: checkpoint must hold run.json beside its rows, got {self.folder / rows[0]} without; "
                    f"remove {self.folder}"
                )
            text = json.dumps({**run, "digest": _digest_of(run)}, indent=1)
            write_text("attribute", self.folder / _RUN, text)
            stored = dict(run)
        differing = [name for name in run if name != "plan" and stored.get(name) != run[name]]
        if differing:
            raise CheckpointError(
                f"attribute: checkpoint must be of this very run, got one that differs in {', '.join(differing)}; "
                f"use another folder or remove {self.folder}"
            )
        self.run, self.digest = stored, _digest_of(stored)

    @staticmethod
    def planned(folder: str | os.PathLike[str] | None) -> tuple[bool, int | None] | None:
        """Return (dense, keep) of a folder's rows; None where there is no run.

        A run that goes on must rank and cut as before: another ranking would choose other rows.
        """
        run = None if folder is None else read_run(Path(folder))
        return None if run is None else (run["plan"]["dense"], run["plan"]["keep"])

    @staticmethod
    def begun_features(folder: str | os.PathLike[str] | None) -> int | None:
        """Return how many features the run in a folder gives a row; None where there is no run."""
        run = None if folder is None else read_run(Path(folder))
        return None if run is None else int(run["max_features"])

    @staticmethod
    def largest(folder: str | os.PathLike[str] | None) -> int | None:
        """Return the bytes of the largest file of rows in a folder; None without a folder."""
        if folder is None:
            return None
        return max((file.stat().st_size for file in Path(folder).glob("rows-*")), default=0)

    def _path(self, row: int) -> Path:
        return self.folder / f"rows-{row:09d}.safetensors"

    def save(self, row: int, packed: PackedRows, bias: Tensor, nodes: Tensor) -> None:
        """Write the rows of these nodes, the first of which is `row`."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(packed, name))) for name in _ARRAYS}
        tensors |= {"bias": bias.cpu(), "nodes": nodes.cpu()}
        metadata = self._metadata(row, tensors)
        replace_file("attribute", self._path(row), lambda file: write_tensors(file, tensors, metadata))

    def _metadata(self, row: int, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the metadata of a file: its run, its first row, the digest of its tensors."""
        bits = digest([tensors[name] for name in (*_ARRAYS, "bias", "nodes")])
        return {"run": self.digest, "row": str(row), "digest": bits}

    def load(self, row: int, nodes: Tensor) -> tuple[PackedRows, Tensor] | None:
        """Return (rows, biases) of the file that begins at `row`, None without one. nodes: of this run's next rows."""
        path = self._path(row)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in (*_ARRAYS, "bias", "nodes")}
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"attribute: checkpoint must hold whole files, got {path}: {error}; delete it"
            ) from None
        expected = self._metadata(row, tensors)
        differing = [name for name in expected if metadata.get(name) != expected[name]]
        if differing:
            raise CheckpointError(
                f"attribute: checkpoint must hold files of this run as they were written, got {path} that differs in "
                f"{', '.join(differing)}; delete it"
            )
        if not torch.equal(tensors["nodes"], nodes[: len(tensors["nodes"])].cpu()):
            raise CheckpointError(
                f"attribute: checkpoint must hold rows of the features that this run comes to, got {path} with others; "
                "delete it and those after it"
            )
        return PackedRows(*(tensors[name].numpy() for name in _ARRAYS)), tensors["bias"].clone()
