"""Transcoders as their files describe them: where every tensor lies, and how it is to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from pycircuit.ops import Activation, ReLU
from pycircuit.transcoders.types import Reads, Writes

from .stored_tensors import StoredTensor

MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Fold:
    """Factors and shifts to be folded into the weights.

    Streams are read as x * gain_in + shift_in; what is written is multiplied by gain_out, for each layer written to,
    and b_dec becomes b_dec * bias_gain + bias_shift. by_norm: an entry is compared after it is multiplied by the norm
    of all its feature writes.
    """

    gain_in: Tensor | float | None = None
    shift_in: Tensor | None = None
    gain_out: Tensor | Sequence[float] | float | None = None
    bias_gain: Tensor | float | None = None
    bias_shift: Tensor | None = None
    by_norm: bool = False


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer where they lie; F features of width d.

    w_enc: [F, d], or [d, F] where `transposed`; w_dec: [F, d], or [F, slots, d] cross-layer, or a list of [F, d], one
    for each layer written to. theta: [F], or its logarithm, `log_theta`; below zero it counts as zero where `positive`.
    w_skip: [d, d] used as x @ w_skip, or as x @ w_skip.T where `skip_transposed`. rule: the activation without theta.
    All None: a layer without a transcoder.
    """

    w_enc: StoredTensor | None = None
    b_enc: StoredTensor | None = None
    w_dec: StoredTensor | Sequence[StoredTensor] | None = None
    b_dec: StoredTensor | None = None
    theta: StoredTensor | None = None
    w_skip: StoredTensor | None = None
    rule: Activation = ReLU()  # noqa: RUF009 - frozen
    transposed: bool = False
    skip_transposed: bool = False
    positive: bool = False
    log_theta: bool = False
    fold: Fold = Fold()

    @property
    def size(self) -> int | None:
        """The number of features; None without a transcoder."""
        return None if self.w_enc is None else self.w_enc.shape[1 if self.transposed else 0]

    def planes(self) -> list[StoredTensor]:
        """The tensors that make up the decoder."""
        return [self.w_dec] if isinstance(self.w_dec, StoredTensor) else list(self.w_dec or ())

    def fingerprint(self) -> list[str]:
        """Text of all that decides the numbers: where they lie and how they are read."""
        fold = (getattr(self.fold, f.name) for f in fields(self.fold))
        flags = (self.rule, self.transposed, self.skip_transposed, self.positive, self.log_theta)
        tensors = (f"{name} {t.path} {t.offset} {t.shape} {t.dtype}" for name, t in self.stored().items())
        return [*map(str, flags), *(str(f.tolist() if isinstance(f, Tensor) else f) for f in fold), *tensors]

    def stored(self) -> dict[str, StoredTensor]:
        """Every tensor by name, each plane of a decoder separately."""
        named = {"w_enc": self.w_enc, "b_enc": self.b_enc, "b_dec": self.b_dec, "theta": self.theta}
        named.update({f"w_dec {i}": plane for i, plane in enumerate(self.planes())}, w_skip=self.w_skip)
        return {name: t for name, t in named.items() if t is not None}


@dataclass(frozen=True)
class Contents:
    """A set of transcoders as its files describe it. config: their configuration, unchanged."""

    path: Path
    layers: list[Layer]
    cross: bool
    reads: Reads
    writes: Writes
    model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


def require_tensors(
    path: Path, tensors: dict[str, StoredTensor], needed: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """Raise an error unless every needed tensor is in the file, and none that would be ignored."""
    for name in needed:
        if name not in tensors:
            raise ValueError(f"load: {path} must hold {name}, got {', '.join(sorted(tensors)) or 'no tensor'}")
    for name in tensors:
        if name not in needed and name not in optional:
            known = ", ".join([*needed, *optional])
            raise ValueError(f"load: {path}: tensors must be among {known}, got {name}, which would be ignored")


def require_same_tensors(layers: Sequence[Layer], *names: str) -> None:
    """Raise an error if one layer has an optional tensor that another layer lacks."""
    for name in names:
        tensors = {i: getattr(layer, name) for i, layer in enumerate(layers) if layer.w_enc is not None}
        present = next((t for t in tensors.values() if t is not None), None)
        lacking = next((i for i, t in tensors.items() if t is None), None)
        if present is not None and lacking is not None:
            raise ValueError(f"load: layer {lacking} must hold what others do, got nothing like {present}")


def _require_shape(stored: StoredTensor | None, expected: tuple[int, ...], why: str) -> None:
    if stored is not None and tuple(stored.shape) != expected:
        raise ValueError(f"load: {stored} must have shape {list(expected)} ({why}), got {list(stored.shape)}")


def check_shapes(contents: Contents) -> None:
    """Compare shapes with each other, before anything is read."""
    layer = next((layer for layer in contents.layers if layer.w_enc is not None), None)
    if layer is None or layer.w_enc is None:
        raise ValueError(f"load: {contents.path} must hold at least one layer with a transcoder, got none")
    first = layer.w_enc
    if len(first.shape) != 2:
        raise ValueError(f"load: {first} must have 2 dimensions, got shape {list(first.shape)}")
    width = first.shape[0] if layer.transposed else first.shape[1]
    if not width:
        raise ValueError(f"load: {first} must have a width of at least 1, got shape {list(first.shape)}")
    for index, layer in enumerate(contents.layers):
        _check_layer(contents, index, layer, width, first)


def _check_layer(contents: Contents, index: int, layer: Layer, width: int, first: StoredTensor) -> None:
    why = f"{first.name} of {first.path.name} has width {width}"
    _require_shape(layer.b_dec, (width,), why)
    _require_shape(layer.w_skip, (width, width), why)
    if layer.w_enc is None:
        for name, stored in layer.stored().items():
            if name not in ("b_dec", "w_skip"):
                raise ValueError(f"load: {stored} must come with an encoder, got none for layer {index}")
        return
    if len(layer.w_enc.shape) != 2:
        raise ValueError(f"load: {layer.w_enc} must have 2 dimensions, got shape {list(layer.w_enc.shape)}")
    size = layer.w_enc.shape[1] if layer.transposed else layer.w_enc.shape[0]
    _require_shape(layer.w_enc, (width, size) if layer.transposed else (size, width), why)
    if not size:
        raise ValueError(f"load: {layer.w_enc} must have at least one feature, got shape {list(layer.w_enc.shape)}")
    for name, tensor in (("b_enc", layer.b_enc), ("w_dec", layer.w_dec)):
        if tensor is None:
            raise ValueError(f"load: {layer.w_enc.path} must hold {name} of layer {index}, got none")
    features = f"{layer.w_enc.name} has {size} features"
    _require_shape(layer.b_enc, (size,), features)
    _require_shape(layer.theta, (size,), features)
    _check_decoder(contents, index, layer, size, width, features)


def _check_decoder(contents: Contents, index: int, layer: Layer, size: int, width: int, why: str) -> None:
    slots = len(contents.layers) - index
    if isinstance(layer.w_dec, StoredTensor):
        expected = (size, slots, width) if contents.cross else (size, width)
        targets = f", {slots} layers from {index} on" * contents.cross
        _require_shape(layer.w_dec, expected, f"{why}, width {width}{targets}")
        return
    planes = layer.planes()
    if len(planes) != slots:
        raise ValueError(f"load: {contents.path} must hold {slots} decoders of layer {index}, got {len(planes)}")
    for plane in planes:
        _require_shape(plane, (size, width), f"{why}, width {width}")
