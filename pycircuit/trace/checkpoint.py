"""Rows on disk as they are found, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from pycircuit.graph.files import replace_file, write_text

from .store import Part

_ARRAYS = ("lengths", "column", "weight", "dropped", "mass")


class CheckpointError(ValueError):
    """The folder holds another run, or a file in it is damaged; the message says which."""


def digest(*parts: Tensor | Sequence[Tensor]) -> str:
    """Of the exact bits of some tensors."""
    found = hashlib.sha256()
    for part in parts:
        for t in [part] if isinstance(part, Tensor) else part:
            found.update(f"{t.dtype}{list(t.shape)}".encode())
            found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class Checkpoint:
    """A folder of run.json, which says what the run is, and one file for every tile of rows, named by its first."""

    def __init__(self, folder: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"attribute: checkpoint must be a folder, got the file {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        described = self.folder / "run.json"
        if not described.exists():
            if any(self.folder.iterdir()):
                raise CheckpointError(
                    f"attribute: checkpoint must be an empty folder or one of an earlier run, got {self.folder} with "
                    "other files in it"
                )
            write_text(described, json.dumps(run, indent=1))
        self.run = self._same(described, run)

    def _same(self, described: Path, run: Mapping[str, Any]) -> dict[str, Any]:
        """The run the folder holds; `plan`, which depends on the memory that was free, is taken from there."""
        try:
            held = json.loads(described.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"attribute: checkpoint must hold a readable run.json, got {error}") from None
        differing = [
            name for name in run if name != "plan" and (not isinstance(held, dict) or held.get(name) != run[name])
        ]
        if differing:
            raise CheckpointError(
                f"attribute: checkpoint must be of this very run, got one that differs in {', '.join(differing)}; "
                f"use another folder or remove {self.folder}"
            )
        return dict(held)

    @staticmethod
    def planned(folder: str | os.PathLike[str]) -> tuple[bool, int | None] | None:
        """How the rows that a folder holds were ranked and cut: (dense, keep); None where it holds no run.

        A run that goes on must do the same: another ranking would choose other rows.
        """
        described = Path(folder) / "run.json"
        try:
            plan = json.loads(described.read_text())["plan"]
            return plan["dense"], plan["keep"]
        except (OSError, ValueError, KeyError, TypeError):  # none, or one that __init__ refuses
            return None

    @staticmethod
    def largest(folder: str | os.PathLike[str]) -> int:
        """Bytes of the largest file of rows in a folder."""
        return max((file.stat().st_size for file in Path(folder).glob("rows-*")), default=0)

    def _path(self, row: int) -> Path:
        return self.folder / f"rows-{row:09d}.safetensors"

    def save(self, row: int, part: Part, bias: Tensor) -> None:
        arrays = {name: getattr(part, name) for name in _ARRAYS}
        replace_file(self._path(row), lambda path: save_file({**arrays, "bias": bias.cpu().numpy()}, path))

    def load(self, row: int) -> tuple[Part, Tensor] | None:
        """The rows from this one on that an earlier run found: (part, bias)."""
        path = self._path(row)
        if not path.exists():
            return None
        try:
            arrays = load_file(path)
            part = Part(*(arrays[name] for name in _ARRAYS))
            bias = arrays["bias"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"attribute: checkpoint must hold whole files, got {path.name}: {error}; delete it"
            ) from None
        entries, count = int(part.lengths.sum()), len(part)
        if not (len(part.column) == len(part.weight) == entries and len(bias) == count == len(part.mass)):
            raise CheckpointError(
                f"attribute: checkpoint must hold whole rows, got {path.name} of other shapes; delete it"
            )
        return part, torch.from_numpy(np.ascontiguousarray(bias))
