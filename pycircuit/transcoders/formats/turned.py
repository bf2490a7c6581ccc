"""Encoders stored as [d, F], feature by feature in the cache: their pages can then stay in a file as all others do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from .cache import made_once
from .files import Stored, open_safetensors, safetensors_header

LEAST = 64 << 20  # bytes from which on it is worth a file; what is smaller is turned in memory
_STEP = 32 << 20  # bytes turned at a time


def turned(stored: Stored) -> Stored:
    """[d, F] as [F, d], written once, with the same numbers."""
    about = f" {stored.offset} {stored.shape} {stored.dtype}"
    kept = made_once("encoders", [stored.path], about, stored.bytes, lambda fresh: _write(stored, fresh))
    return replace(open_safetensors(kept)["w_enc"], name=f"{stored.name} of {stored.path.name}")


def _write(stored: Stored, fresh: Path) -> None:
    held, (width, size) = stored.mapped(), stored.shape
    step = max(1, _STEP // (width * stored.dtype.itemsize))
    with fresh.open("wb") as out:
        out.write(safetensors_header({"w_enc": (stored.dtype, (size, width))}))
        for begin in range(0, size, step):
            part = held[:, begin : begin + step].T.contiguous()
            out.write(part.view(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())
