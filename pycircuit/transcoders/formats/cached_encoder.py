"""Encoders as they are read, feature by feature, in the cache: their pages can then stay in a file as all others do.

Those stored as [d, F] are turned; those that a fold multiplies are multiplied. The same numbers as in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pycircuit.files.safetensors import safetensors_header

from .cache import made_once
from .files import Stored, open_safetensors

LEAST = 64 << 20  # bytes from which on it is worth a file; what is smaller is done in memory
_STEP = 32 << 20  # bytes turned at a time


def kept(stored: Stored, transposed: bool, gain: Tensor | None, norm: Tensor | None) -> Stored:
    """[F, d] of [F, d] or, `transposed`, [d, F], multiplied as by `multiplied`; written once."""
    factors = hashlib.sha256(b"|".join(b"" if t is None else t.numpy().tobytes() for t in (gain, norm))).hexdigest()
    about = f" {stored.offset} {stored.shape} {stored.dtype} {transposed} {factors}"

    def write(fresh: Path) -> None:
        _write(stored, transposed, gain, norm, fresh)

    path = made_once("encoders", [stored.path], about, stored.bytes, write)
    return replace(open_safetensors(path)["w_enc"], name=f"{stored.name} of {stored.path.name}")


def multiplied(rows: Tensor, gain: Tensor | None, norm: Tensor | None) -> Tensor:
    """rows [n, d] times gain ([] or [d]) and norm [n], in float32 at the least."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if gain is not None:
        rows = rows.to(wide) * gain.to(wide)
    return rows if norm is None else rows.to(wide) * norm[:, None].to(wide)


def _write(stored: Stored, transposed: bool, gain: Tensor | None, norm: Tensor | None, fresh: Path) -> None:
    held = stored.mapped().T if transposed else stored.mapped()
    step = max(1, _STEP // (held.shape[1] * stored.dtype.itemsize))
    with fresh.open("wb") as out:
        out.write(safetensors_header({"w_enc": (stored.dtype, tuple(held.shape))}))
        for begin in range(0, held.shape[0], step):
            end = begin + step
            part = multiplied(held[begin:end].contiguous(), gain, None if norm is None else norm[begin:end])
            out.write(part.to(stored.dtype).view(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def norms(planes: Sequence[Stored], keep: bool) -> Tensor:
    """Of everything each feature writes: [F] float64. keep: once for all of these files, which are read whole."""
    if not keep or sum(plane.bytes for plane in planes) < LEAST:
        return _norms(planes)
    about = "".join(f" {plane.offset} {plane.shape} {plane.stride} {plane.dtype}" for plane in planes)

    def write(fresh: Path) -> None:
        found = _norms(planes)
        with fresh.open("wb") as out:
            out.write(safetensors_header({"norm": (found.dtype, tuple(found.shape))}) + found.numpy().tobytes())
            out.flush()
            os.fsync(out.fileno())

    path = made_once("norms", [plane.path for plane in planes], about, 8 * planes[0].shape[0], write)
    return open_safetensors(path)["norm"].read()


def _norms(planes: Sequence[Stored]) -> Tensor:
    total = []
    for plane in planes:
        total.append(torch.cat([chunk.double().flatten(1).square().sum(1) for chunk in plane.chunks()]))
        bad = (~total[-1].isfinite()).nonzero()
        if len(bad):
            raise ValueError(f"load: {plane} must hold finite numbers, got others in row {int(bad[0])}")
    return torch.stack(total).sum(0).sqrt()
