"""A run in one file: weights, Adam's moments and what was measured; the buffers come again from the seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pycircuit.graph.files import replace_file
from pycircuit.trace import CheckpointError


def save(path: Path, run: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Whole or not at all: the file takes its name when all of it is on the disk."""
    whole = {name: t.detach().contiguous() for name, t in tensors.items()}
    replace_file(path, lambda fresh: save_file(whole, fresh, {"run": json.dumps(run)}))


def load(path: Path, run: Mapping[str, Any], device: str) -> dict[str, Tensor] | None:
    """What `save` wrote for this very run; None if there is no file yet."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt", device=device) as file:
            held = json.loads((file.metadata() or {})["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"train: checkpoint must be a file of an earlier run, got {path}: {error}") from None
    differing = [name for name in run if held.get(name) != run[name]]
    if differing:
        raise CheckpointError(
            f"train: checkpoint must be of this very run, got one that differs in {', '.join(differing)}; use another "
            f"file or remove {path}"
        )
    return tensors
