"""Encoders turned and folded once, in the cache folder: their pages can then stay in a file as all others do.

Those stored as [d, F] are transposed; those that a fold multiplies are multiplied. The numbers are those of memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import BinaryIO

import torch
from torch import Tensor

from pycircuit.files.cache_folder import cached_file
from pycircuit.files.safetensors import safetensors_header

from .stored_tensors import StoredTensor, open_safetensors

LEAST_BYTES = 64 << 20  # of an encoder that is worth a file; what is smaller is done in memory
_STEP = 32 << 20  # bytes transposed at a time


def cached_encoder(stored: StoredTensor, transposed: bool, gain: Tensor | None, norm: Tensor | None) -> StoredTensor:
    """[F, d] of [F, d] or, `transposed`, [d, F], multiplied as by `multiplied`; written once."""
    factors = hashlib.sha256(b"|".join(b"" if t is None else t.numpy().tobytes() for t in (gain, norm))).hexdigest()
    details = f" {stored.offset} {stored.shape} {stored.dtype} {transposed} {factors}"

    def write(file: BinaryIO) -> None:
        _write(stored, transposed, gain, norm, file)

    path = cached_file("encoders", [stored.path], details, stored.bytes, write)
    return replace(open_safetensors(path)["w_enc"], name=f"{stored.name} of {stored.path.name}")


def multiplied(rows: Tensor, gain: Tensor | None, norm: Tensor | None) -> Tensor:
    """Rows [n, d] times gain ([] or [d]) and norm [n], in float32 at the least."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if gain is not None:
        rows = rows.to(wide) * gain.to(wide)
    return rows if norm is None else rows.to(wide) * norm[:, None].to(wide)


def _write(stored: StoredTensor, transposed: bool, gain: Tensor | None, norm: Tensor | None, file: BinaryIO) -> None:
    w_enc = stored.mapped().T if transposed else stored.mapped()
    step = max(1, _STEP // (w_enc.shape[1] * stored.dtype.itemsize))
    file.write(safetensors_header({"w_enc": (stored.dtype, tuple(w_enc.shape))}))
    for begin in range(0, w_enc.shape[0], step):
        end = begin + step
        rows = multiplied(w_enc[begin:end].contiguous(), gain, None if norm is None else norm[begin:end])
        file.write(rows.to(stored.dtype).view(-1).view(torch.uint8).numpy().data)


def decoder_norms(planes: Sequence[StoredTensor], cached: bool) -> Tensor:
    """Norms of everything each feature writes: [F] float64. cached: kept in a file, since decoders are read for it."""
    if not cached or sum(plane.bytes for plane in planes) < LEAST_BYTES:
        return _norms(planes)
    details = "".join(f" {plane.offset} {plane.shape} {plane.stride} {plane.dtype}" for plane in planes)

    def write(file: BinaryIO) -> None:
        norms = _norms(planes)
        file.write(safetensors_header({"norm": (norms.dtype, tuple(norms.shape))}) + norms.numpy().tobytes())

    path = cached_file("norms", [plane.path for plane in planes], details, 8 * planes[0].shape[0], write)
    return open_safetensors(path)["norm"].read()


def _norms(planes: Sequence[StoredTensor]) -> Tensor:
    squares = []
    for plane in planes:
        squares.append(torch.cat([chunk.double().flatten(1).square().sum(1) for chunk in plane.chunks()]))
        bad = (~squares[-1].isfinite()).nonzero()
        if len(bad):
            raise ValueError(f"load: {plane} must hold finite numbers, got others in row {int(bad[0])}")
    return torch.stack(squares).sum(0).sqrt()
