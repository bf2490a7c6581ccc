"""Transcoders read from their files, decoders left there where that is asked for."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from pycircuit.files.memory_maps import drop_resident_pages
from pycircuit.ops import Activation, JumpReLU, ReLU
from pycircuit.transcoders.lazy import LazyRows, RowCache, in_dtype, is_finite
from pycircuit.transcoders.types import CrossLayerTranscoder, PerLayerTranscoders, Transcoders

from . import cached_encoder
from .contents import Contents, Layer, check_shapes
from .stored_tensors import StoredTensor


def require_finite(stored: StoredTensor, t: Tensor) -> Tensor:
    """The tensor, unless it holds NaN or infinity."""
    if is_finite(t):
        drop_resident_pages(t)
        return t
    index = [int(i) for i in (~t.isfinite()).nonzero()[0].tolist()]
    got = float(t[tuple(index)])
    raise ValueError(f"load: {stored} must hold finite numbers, got {got} at {index}; is the file damaged?")


def read_scalar(stored: StoredTensor) -> float:
    """The number that a tensor of one entry holds."""
    if prod(stored.shape) != 1:
        raise ValueError(f"load: {stored} must hold one number, got shape {list(stored.shape)}")
    return float(require_finite(stored, stored.read()).flatten()[0])


class LayerReader:
    """Tensors of a layer, read in the type and onto the device asked for.

    cached: encoders and norms that take work are written once, into the cache folder.
    """

    def __init__(
        self,
        layer: Layer,
        device: Any,
        dtype: torch.dtype | None,
        lazy: bool,
        row_cache: RowCache | None = None,
        cached: bool = False,
    ) -> None:
        self.layer = layer
        self.device = device
        self.dtype = dtype
        self.lazy = lazy
        self.row_cache = RowCache(0) if row_cache is None else row_cache
        self.cached = cached and torch.device(device or "cpu").type == "cpu"
        compares = layer.theta is not None or not isinstance(layer.rule, ReLU)
        by_norm = layer.fold.by_norm and compares
        self.norm = cached_encoder.decoder_norms(layer.planes(), self.cached) if by_norm else None

    def _placed(self, t: Tensor, like: StoredTensor) -> Tensor:
        """The tensor in the type asked for, or in that of `like`, on the device."""
        return in_dtype(str(like), t, like.dtype if self.dtype is None else self.dtype).to(self.device)

    def _scaled(self) -> bool:
        """True if values are in units of the norm of what they write."""
        return self.norm is not None and self.layer.theta is None

    def w_enc(self) -> Tensor | None:
        """[F, d]; pages of the file, or of one in the cache folder, where no number changes its type."""
        layer, stored = self.layer, self.layer.w_enc
        if stored is None:
            return None
        gain = None if layer.fold.gain_in is None else torch.as_tensor(layer.fold.gain_in, dtype=torch.float64)
        gain = None if gain is None or _is_one(gain) else gain
        norm = self.norm if self._scaled() else None
        changes = layer.transposed or gain is not None or norm is not None
        large = stored.bytes >= cached_encoder.LEAST_BYTES
        if self.cached and changes and self.dtype in (None, stored.dtype) and large:
            stored = cached_encoder.cached_encoder(stored, layer.transposed, gain, norm)
            return require_finite(stored, stored.mapped())
        w_enc = require_finite(stored, stored.mapped() if self.lazy else stored.read())
        if layer.transposed:
            w_enc = w_enc.T.contiguous()
        return self._placed(cached_encoder.multiplied(w_enc, gain, norm), stored)

    def b_enc(self) -> Tensor | None:
        """[F]"""
        layer, stored = self.layer, self.layer.b_enc
        if stored is None:
            return None
        b_enc = require_finite(stored, stored.read())
        if layer.fold.shift_in is not None and layer.w_enc is not None:
            b_enc = b_enc.double() + _encoded_shift(layer.w_enc, layer.transposed, layer.fold.shift_in)
        if self._scaled():
            assert self.norm is not None
            b_enc = b_enc * self.norm
        return self._placed(b_enc, stored)

    def b_dec(self) -> Tensor | None:
        """[d]"""
        stored, fold = self.layer.b_dec, self.layer.fold
        b_dec = None if stored is None else require_finite(stored, stored.read())
        if b_dec is not None and fold.bias_gain is not None and not _is_one(fold.bias_gain):
            b_dec = b_dec.double() * torch.as_tensor(fold.bias_gain, dtype=torch.float64)
        like = stored or self.layer.w_enc
        if fold.bias_shift is not None and like is not None:
            width = like.shape[0] if b_dec is not None or self.layer.transposed else like.shape[1]
            b_dec = fold.bias_shift.double().expand(width) + (0.0 if b_dec is None else b_dec)
        return None if b_dec is None or like is None else self._placed(b_dec, like)

    def w_dec(self) -> Any:
        """[F, d] or [F, slots, d]; rows left in their files where the reader is lazy."""
        layer, fold = self.layer, self.layer.fold
        if layer.w_dec is None:
            return None
        stacked = not isinstance(layer.w_dec, StoredTensor)
        planes = layer.planes()
        gain = None if fold.gain_out is None or _is_one(fold.gain_out) else _gain(fold.gain_out)
        share = _inverse(self.norm) if self._scaled() and self.norm is not None else None
        types = {plane.dtype for plane in planes}
        rows = LazyRows.of(planes, stacked, self.dtype, self.row_cache, gain, share)
        if self.lazy and len(types) == 1 and types <= set(LazyRows.DTYPES):
            return rows
        return rows.placed(rows.rows(torch.arange(rows.shape[0])), self.device)

    def w_skip(self) -> Tensor | None:
        """[d, d], used as x @ w_skip."""
        stored = self.layer.w_skip
        if stored is None:
            return None
        t = self._placed(require_finite(stored, stored.read()), stored)
        return t.T.contiguous() if self.layer.skip_transposed else t

    def rule(self) -> Activation:
        """The activation, with its thresholds."""
        layer, stored = self.layer, self.layer.theta
        if stored is None:
            return layer.rule
        theta = require_finite(stored, stored.read())
        theta = theta.double().exp() if layer.log_theta else theta
        theta = theta.clamp_min(0.0) if layer.positive else theta
        if self.norm is not None:
            theta = theta.double() / self.norm
        wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
        dtype = stored.dtype if theta.dtype == stored.dtype else wide
        theta = in_dtype(str(stored), theta, dtype if self.dtype is None else self.dtype)
        return JumpReLU(theta.to(self.device))


def _is_one(gain: Any) -> bool:
    return bool((torch.as_tensor(gain, dtype=torch.float64) == 1.0).all())


def _gain(gain: Any) -> Tensor:
    """[] for all, [d], or [slots, 1] from a list with one for each slot."""
    t = torch.as_tensor(gain, dtype=torch.float64)
    return t[:, None] if t.ndim == 1 and isinstance(gain, list) else t


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, 1.0 / norm, torch.zeros_like(norm))


def _encoded_shift(w_enc: StoredTensor, transposed: bool, shift: Tensor) -> Tensor:
    """Pre-activations that a shift ([] or [d]) of the stream adds: [F] float64, a chunk of the file at a time."""
    expanded = shift.double().expand(w_enc.shape[0 if transposed else 1])
    if not transposed:
        return torch.cat([chunk.double() @ expanded for chunk in w_enc.chunks()])
    total = torch.zeros(w_enc.shape[1], dtype=torch.float64)
    row = 0
    for chunk in w_enc.chunks():
        total += expanded[row : row + len(chunk)] @ chunk.double()
        row += len(chunk)
    return total


def read_transcoders(
    contents: Contents,
    device: Any = None,
    dtype: torch.dtype | None = None,
    lazy: bool = True,
    cache_bytes: int = 4 << 30,
) -> Transcoders:
    """Transcoders of these files, decoders left in them where `lazy`."""
    check_shapes(contents)
    row_cache = RowCache(cache_bytes)
    readers = [LayerReader(layer, device, dtype, lazy, row_cache, cached=lazy) for layer in contents.layers]
    kind = CrossLayerTranscoder if contents.cross else PerLayerTranscoders
    return kind(
        [reader.w_enc() for reader in readers],
        [reader.b_enc() for reader in readers],
        [reader.w_dec() for reader in readers],
        [reader.b_dec() for reader in readers],
        [reader.rule() for reader in readers],
        [reader.w_skip() for reader in readers],
        contents.reads,
        contents.writes,
    )
