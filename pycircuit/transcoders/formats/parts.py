"""What every format says of its files, and transcoders made of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pycircuit.ops import Activation, BatchTopK, JumpReLU, ReLU, TopK
from pycircuit.transcoders.lazy import Cache, LazyRows
from pycircuit.transcoders.types import CrossLayerTranscoder, PerLayerTranscoders, Transcoders

from .files import Stored


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer where they lie; F features of width d.

    w_enc: [F, d], or [d, F] where `transposed`; w_dec: [F, d], or [F, slots, d] cross-layer, or a list of [F, d], one
    for each layer written to. theta: [F]. w_skip: [d, d] used as x @ w_skip, or as x @ w_skip.T where `skip_back`.
    rule: the activation where theta does not say it. All None: no transcoder here.
    """

    w_enc: Stored | None = None
    b_enc: Stored | None = None
    w_dec: Stored | Sequence[Stored] | None = None
    b_dec: Stored | None = None
    theta: Stored | None = None
    w_skip: Stored | None = None
    rule: Activation = ReLU()  # noqa: RUF009 - frozen
    transposed: bool = False
    skip_back: bool = False

    def stored(self) -> dict[str, Stored]:
        """Every tensor, the planes of a decoder one by one."""
        planes = self.w_dec if isinstance(self.w_dec, list | tuple) else [self.w_dec]
        named = {"w_enc": self.w_enc, "b_enc": self.b_enc, "b_dec": self.b_dec, "theta": self.theta}
        named.update({f"w_dec {at}": p for at, p in enumerate(planes)}, w_skip=self.w_skip)
        return {name: t for name, t in named.items() if t is not None}


@dataclass(frozen=True)
class Contents:
    """A set of transcoders as its files describe it. config: what the files say of it, as they say it."""

    path: Path
    layers: list[Layer]
    cross: bool
    reads: str
    writes: str
    model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


def take(path: Path, tensors: dict[str, Stored], needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    """All that is needed is there, and nothing that nobody asked for."""
    for name in needed:
        if name not in tensors:
            raise ValueError(f"load: {path} must hold {name}, got {', '.join(sorted(tensors)) or 'no tensor'}")
    for name in tensors:
        if name not in needed and name not in optional:
            known = ", ".join([*needed, *optional])
            raise ValueError(f"load: {path}: tensors must be among {known}, got {name}, which would be ignored")


def _shaped(stored: Stored | None, expected: tuple[int, ...], why: str) -> None:
    if stored is not None and tuple(stored.shape) != expected:
        raise ValueError(f"load: {stored} must have shape {list(expected)} ({why}), got {list(stored.shape)}")


def check(contents: Contents) -> None:
    """Shapes against each other, before anything is read."""
    first = next((layer.w_enc for layer in contents.layers if layer.w_enc is not None), None)
    if first is None:
        raise ValueError(f"load: {contents.path} must hold at least one layer with a transcoder, got none")
    one = next(layer for layer in contents.layers if layer.w_enc is not None)
    for stored in (first,):
        if len(stored.shape) != 2:
            raise ValueError(f"load: {stored} must have 2 dimensions, got shape {list(stored.shape)}")
    width = first.shape[0] if one.transposed else first.shape[1]
    for at, layer in enumerate(contents.layers):
        _check_layer(contents, at, layer, width, first)


def _check_layer(contents: Contents, at: int, layer: Layer, width: int, first: Stored) -> None:
    why = f"{first.name} of {first.path.name} has width {width}"
    _shaped(layer.b_dec, (width,), why)
    _shaped(layer.w_skip, (width, width), why)
    if layer.w_enc is None:
        for name, stored in layer.stored().items():
            if name not in ("b_dec", "w_skip"):
                raise ValueError(f"load: {stored} must come with an encoder, got none for layer {at}")
        return
    if len(layer.w_enc.shape) != 2:
        raise ValueError(f"load: {layer.w_enc} must have 2 dimensions, got shape {list(layer.w_enc.shape)}")
    size = layer.w_enc.shape[1] if layer.transposed else layer.w_enc.shape[0]
    _shaped(layer.w_enc, (width, size) if layer.transposed else (size, width), why)
    for name, stored in (("b_enc", layer.b_enc), ("w_dec", layer.w_dec)):
        if stored is None:
            raise ValueError(f"load: {layer.w_enc.path} must hold {name} of layer {at}, got none")
    features = f"{layer.w_enc.name} has {size} features"
    _shaped(layer.b_enc, (size,), features)
    _shaped(layer.theta, (size,), features)
    _check_decoder(contents, at, layer, size, width, features)


def _check_decoder(contents: Contents, at: int, layer: Layer, size: int, width: int, why: str) -> None:
    slots = len(contents.layers) - at
    if isinstance(layer.w_dec, Stored):
        expected = (size, slots, width) if contents.cross else (size, width)
        _shaped(layer.w_dec, expected, f"{why}, width {width}" + (f", {slots} layers from {at} on" * contents.cross))
        return
    planes = list(layer.w_dec or ())
    if len(planes) != slots:
        raise ValueError(f"load: {contents.path} must hold {slots} decoders of layer {at}, got {len(planes)}")
    for plane in planes:
        _shaped(plane, (size, width), f"{why}, width {width}")


def finite(stored: Stored, t: Tensor) -> Tensor:
    """The tensor, unless it holds NaN or infinity."""
    for begin in range(0, max(1, t.shape[0] if t.ndim else 1), 4096):
        part = t[begin : begin + 4096] if t.ndim else t
        bad = ~part.isfinite()
        if bool(bad.any()):
            where = [int(i) for i in bad.nonzero()[0].tolist()] if t.ndim else []
            where[:1] = [begin + where[0]] if where else []
            raise ValueError(
                f"load: {stored} must hold finite numbers, got {float(t[tuple(where)])} at {where}; is the file damaged?"
            )
    return t


class _Reader:
    """Tensors of a layer, read once, in the type and place asked for."""

    def __init__(self, device: Any, dtype: torch.dtype | None, lazy: bool, cache: Cache) -> None:
        self.device, self.dtype, self.lazy, self.cache = device, dtype, lazy, cache

    def _placed(self, t: Tensor) -> Tensor:
        return t.to(device=self.device, dtype=self.dtype)

    def small(self, stored: Stored | None) -> Tensor | None:
        return None if stored is None else self._placed(finite(stored, stored.read()))

    def encoder(self, layer: Layer) -> Tensor | None:
        """[F, d]; straight from the file's pages where it lies there so."""
        if layer.w_enc is None:
            return None
        if layer.transposed:
            return self._placed(finite(layer.w_enc, layer.w_enc.read()).T.contiguous())
        held = layer.w_enc.mapped() if self.lazy else layer.w_enc.read()
        return self._placed(finite(layer.w_enc, held))

    def decoder(self, layer: Layer) -> Any:
        if layer.w_dec is None:
            return None
        planes = [layer.w_dec] if isinstance(layer.w_dec, Stored) else list(layer.w_dec)
        stacked = not isinstance(layer.w_dec, Stored)
        if self.lazy and all(p.dtype in LazyRows.DTYPES for p in planes) and len({p.dtype for p in planes}) == 1:
            return LazyRows.of(planes, stacked, self.dtype, self.cache)
        read = [self._placed(finite(p, p.read())) for p in planes]
        return torch.stack(read, 1) if stacked else read[0]

    def skip(self, layer: Layer) -> Tensor | None:
        t = self.small(layer.w_skip)
        return t.T.contiguous() if t is not None and layer.skip_back else t

    def rule(self, layer: Layer) -> Activation:
        theta = self.small(layer.theta)
        return layer.rule if theta is None else JumpReLU(theta)


def assemble(
    contents: Contents, device: Any = None, dtype: torch.dtype | None = None, lazy: bool = True, cache: int = 4 << 30
) -> Transcoders:
    """Transcoders of these files, decoders left in them where `lazy`."""
    check(contents)
    reader, layers = _Reader(device, dtype, lazy, Cache(cache)), contents.layers
    made = CrossLayerTranscoder if contents.cross else PerLayerTranscoders
    return made(
        [reader.encoder(layer) for layer in layers],
        [reader.small(layer.b_enc) for layer in layers],
        [reader.decoder(layer) for layer in layers],
        [reader.small(layer.b_dec) for layer in layers],
        [reader.rule(layer) for layer in layers],
        [reader.skip(layer) for layer in layers],
        contents.reads,
        contents.writes,
    )


def describe(rule: Activation) -> dict[str, Any]:
    """An activation as a configuration says it; thresholds of their own are tensors."""
    if isinstance(rule, TopK):
        return {"activation": "topk", "k": rule.k, "keep_negative": rule.keep_negative}
    if isinstance(rule, BatchTopK):
        return {"activation": "batchtopk", "threshold": rule.threshold}
    return {"activation": "jumprelu" if isinstance(rule, JumpReLU) else "relu"}


def rule_of(said_by: Path, said: Any) -> Activation:
    """The activation that `describe` described."""
    if not isinstance(said, dict):
        raise ValueError(f"load: {said_by}: activation must be names and values, got {said!r}")
    name = said.get("activation")
    if name in ("relu", "jumprelu"):
        return ReLU()
    if name == "topk":
        keep = said.get("keep_negative", False)
        if not isinstance(keep, bool):
            raise ValueError(f"load: {said_by}: keep_negative must be true or false, got {keep!r}")
        return TopK(whole(said_by, "k", said.get("k"), 1), keep)
    if name == "batchtopk":
        return BatchTopK(number(said_by, "threshold", said.get("threshold")))
    raise ValueError(f"load: {said_by}: activation must be relu, jumprelu, topk or batchtopk, got {name!r}")


def whole(said_by: Path, name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"load: {said_by}: {name} must be a whole number of at least {least}, got {value!r}")
    return value


def number(said_by: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or value != value or abs(value) == float("inf"):
        raise ValueError(f"load: {said_by}: {name} must be a finite number, got {value!r}")
    return float(value)
