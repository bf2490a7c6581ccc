"""Checkpoint of a run in one file: weights, Adam's moments and measurements; the seed gives the buffers again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pycircuit.files.atomic import replace_file
from pycircuit.files.safetensors import write_tensors
from pycircuit.trace import CheckpointError
from pycircuit.trace.checkpoint import digest


def save(path: Path, run: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint, with the digest of its tensors."""
    metadata = {"run": json.dumps(run), "digest": _digest_of(tensors)}
    replace_file("train", path, lambda file: write_tensors(file, tensors, metadata))


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    digests = {name: digest(t) for name, t in tensors.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def load(path: Path, run: Mapping[str, Any], device: str) -> dict[str, Tensor] | None:
    """Read the checkpoint of this run; None if there is no file yet."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt", device=device) as file:
            metadata = file.metadata() or {}
            stored = dict(json.loads(metadata["run"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"train: checkpoint must be a file of an earlier run, got {path}: {error}") from None
    if metadata.get("digest") != _digest_of(tensors):
        raise CheckpointError(
            f"train: checkpoint must be a file as it was written, got {path} with another digest; remove it"
        )
    differing = [name for name in run if stored.get(name) != run[name]]
    if differing:
        raise CheckpointError(
            f"train: checkpoint must be of this run, got one that differs in {', '.join(differing)}; use another "
            f"file or remove {path}"
        )
    return tensors
