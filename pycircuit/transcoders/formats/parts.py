"""What every format says of its files, and transcoders made of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from sys import float_info
from typing import Any

import torch
from torch import Tensor

from pycircuit.ops import Activation, BatchTopK, JumpReLU, ReLU, TopK
from pycircuit.transcoders import resident_pages
from pycircuit.transcoders.lazy import Cache, LazyRows, is_finite, narrowed
from pycircuit.transcoders.types import CrossLayerTranscoder, PerLayerTranscoders, Transcoders

from . import cached_encoder
from .files import Stored

MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Asked:
    """What whoever loads knows better than the files. layers: of the model, where some may have no transcoder.

    variant: parts of a path, with commas, where a folder holds several sets. reads, writes: as transcoders say them.
    """

    layers: int | None = None
    variant: str | None = None
    reads: str | None = None
    writes: str | None = None


@dataclass(frozen=True)
class Fold:
    """What is folded into the weights. Streams are read as x * gain_in + shift_in; what is written is multiplied by
    gain_out, for each layer written to, and b_dec becomes b_dec * bias_gain + bias_shift.

    by_norm: an entry is compared after it is multiplied by the norm of all its feature writes.
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
    w_skip: [d, d] used as x @ w_skip, or as x @ w_skip.T where `skip_back`. rule: the activation where theta does not
    say it. All None: no transcoder here.
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
    positive: bool = False
    log_theta: bool = False
    fold: Fold = Fold()

    @property
    def size(self) -> int | None:
        """The number of features; None without a transcoder."""
        return None if self.w_enc is None else self.w_enc.shape[1 if self.transposed else 0]

    def planes(self) -> list[Stored]:
        """The places of the decoder."""
        return [self.w_dec] if isinstance(self.w_dec, Stored) else list(self.w_dec or ())

    def told(self) -> list[str]:
        """All that says how the tensors are taken, and where in their files they are."""
        fold = (getattr(self.fold, one.name) for one in fields(self.fold))
        flags = (self.rule, self.transposed, self.skip_back, self.positive, self.log_theta)
        places = (f"{name} {t.path} {t.offset} {t.shape} {t.dtype}" for name, t in self.stored().items())
        return [*map(str, flags), *(str(f.tolist() if isinstance(f, Tensor) else f) for f in fold), *places]

    def stored(self) -> dict[str, Stored]:
        """Every tensor, the planes of a decoder one by one."""
        named = {"w_enc": self.w_enc, "b_enc": self.b_enc, "b_dec": self.b_dec, "theta": self.theta}
        named.update({f"w_dec {at}": p for at, p in enumerate(self.planes())}, w_skip=self.w_skip)
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


def alike(layers: Sequence[Layer], *names: str) -> None:
    """Of sets whose layers are all of one kind: what one layer has and another one lacks was lost."""
    for name in names:
        held = {at: getattr(one, name) for at, one in enumerate(layers) if one.w_enc is not None}
        there = next((t for t in held.values() if t is not None), None)
        lost = next((at for at, t in held.items() if t is None), None)
        if there is not None and lost is not None:
            raise ValueError(f"load: layer {lost} must hold what others do, got nothing like {there}")


def missing(folder: Path, at: int, name: str = "a file") -> FileNotFoundError:
    return FileNotFoundError(
        f"load: {folder} must hold {name} of layer {at}, got none; say layers= (the model's number of layers) where a "
        "layer without a transcoder is meant"
    )


def same_everywhere(name: str, values: dict[Any, str]) -> str | None:
    """The one value that all layers have; None without any."""
    distinct = sorted(set(values.values()))
    if len(distinct) > 1:
        first = {value: where for where, value in reversed(values.items())}
        got = " and ".join(f"{value} ({first[value]})" for value in distinct)
        raise ValueError(f"load: {name} must be the same in every layer, got {got}")
    return distinct[0] if distinct else None


def scalar(stored: Stored) -> float:
    """The number that a tensor of one entry holds."""
    if prod(stored.shape) != 1:
        raise ValueError(f"load: {stored} must hold one number, got shape {list(stored.shape)}")
    return float(finite(stored, stored.read()).flatten()[0])


def _shaped(stored: Stored | None, expected: tuple[int, ...], why: str) -> None:
    if stored is not None and tuple(stored.shape) != expected:
        raise ValueError(f"load: {stored} must have shape {list(expected)} ({why}), got {list(stored.shape)}")


def check(contents: Contents) -> None:
    """Shapes against each other, before anything is read."""
    one = next((layer for layer in contents.layers if layer.w_enc is not None), None)
    if one is None or one.w_enc is None:
        raise ValueError(f"load: {contents.path} must hold at least one layer with a transcoder, got none")
    first = one.w_enc
    if len(first.shape) != 2:
        raise ValueError(f"load: {first} must have 2 dimensions, got shape {list(first.shape)}")
    width = first.shape[0] if one.transposed else first.shape[1]
    if not width:
        raise ValueError(f"load: {first} must have a width of at least 1, got shape {list(first.shape)}")
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
    if not size:
        raise ValueError(f"load: {layer.w_enc} must have at least one feature, got shape {list(layer.w_enc.shape)}")
    for name, part in (("b_enc", layer.b_enc), ("w_dec", layer.w_dec)):
        if part is None:
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
    planes = layer.planes()
    if len(planes) != slots:
        raise ValueError(f"load: {contents.path} must hold {slots} decoders of layer {at}, got {len(planes)}")
    for plane in planes:
        _shaped(plane, (size, width), f"{why}, width {width}")


def finite(stored: Stored, t: Tensor) -> Tensor:
    """The tensor, unless it holds NaN or infinity."""
    if is_finite(t):
        resident_pages.let_go(t)
        return t
    where = [int(i) for i in (~t.isfinite()).nonzero()[0].tolist()]
    got = float(t[tuple(where)])
    raise ValueError(f"load: {stored} must hold finite numbers, got {got} at {where}; is the file damaged?")


class Reader:
    """Tensors of a layer, read once, in the type and place asked for. keep: what takes work, in the cache folder."""

    def __init__(
        self, layer: Layer, device: Any, dtype: torch.dtype | None, lazy: bool, cache: Cache | None = None,
        keep: bool = False,
    ) -> None:  # fmt: skip
        self.layer, self.device, self.dtype, self.lazy = layer, device, dtype, lazy
        self.cache = Cache(0) if cache is None else cache
        self.keep = keep and torch.device(device or "cpu").type == "cpu"
        self.norm = cached_encoder.norms(layer.planes(), self.keep) if layer.fold.by_norm and self._compares() else None

    def _compares(self) -> bool:
        return self.layer.theta is not None or not isinstance(self.layer.rule, ReLU)

    def _placed(self, t: Tensor, like: Stored) -> Tensor:
        """like: whose type it has where none was asked for."""
        return narrowed(str(like), t, like.dtype if self.dtype is None else self.dtype).to(self.device)

    def _scaled(self) -> bool:
        """Whether values are in units of the norm of what they write."""
        return self.norm is not None and self.layer.theta is None

    def w_enc(self) -> Tensor | None:
        """[F, d]; pages of the file, or of one in the cache folder that lies so, where no number changes its type."""
        layer, stored = self.layer, self.layer.w_enc
        if stored is None:
            return None
        gain = None if layer.fold.gain_in is None else torch.as_tensor(layer.fold.gain_in, dtype=torch.float64)
        gain = None if gain is None or _is_one(gain) else gain
        norm = self.norm if self._scaled() else None
        changes = layer.transposed or gain is not None or norm is not None
        if self.keep and changes and self.dtype in (None, stored.dtype) and stored.bytes >= cached_encoder.LEAST:
            stored = cached_encoder.kept(stored, layer.transposed, gain, norm)
            return finite(stored, stored.mapped())
        held = finite(stored, stored.mapped() if self.lazy else stored.read())
        if layer.transposed:
            held = held.T.contiguous()
        return self._placed(cached_encoder.multiplied(held, gain, norm), stored)

    def b_enc(self) -> Tensor | None:
        layer, stored = self.layer, self.layer.b_enc
        if stored is None:
            return None
        held = finite(stored, stored.read())
        if layer.fold.shift_in is not None and layer.w_enc is not None:
            held = held.double() + _shifted(layer.w_enc, layer.transposed, layer.fold.shift_in)
        if self._scaled():
            assert self.norm is not None
            held = held * self.norm
        return self._placed(held, stored)

    def b_dec(self) -> Tensor | None:
        stored, fold = self.layer.b_dec, self.layer.fold
        held = None if stored is None else finite(stored, stored.read())
        if held is not None and fold.bias_gain is not None and not _is_one(fold.bias_gain):
            held = held.double() * torch.as_tensor(fold.bias_gain, dtype=torch.float64)
        like = stored or self.layer.w_enc
        if fold.bias_shift is not None and like is not None:
            width = like.shape[0] if held is not None or self.layer.transposed else like.shape[1]
            held = fold.bias_shift.double().expand(width) + (0.0 if held is None else held)
        return None if held is None or like is None else self._placed(held, like)

    def w_dec(self) -> Any:
        layer, fold = self.layer, self.layer.fold
        if layer.w_dec is None:
            return None
        stacked = not isinstance(layer.w_dec, Stored)
        planes = layer.planes()
        gain = None if fold.gain_out is None or _is_one(fold.gain_out) else _gain(fold.gain_out)
        share = _inverse(self.norm) if self._scaled() and self.norm is not None else None
        types = {plane.dtype for plane in planes}
        rows = LazyRows.of(planes, stacked, self.dtype, self.cache, gain, share)
        if self.lazy and len(types) == 1 and types <= set(LazyRows.DTYPES):
            return rows
        return rows.placed(rows.rows(torch.arange(rows.shape[0])), self.device)

    def w_skip(self) -> Tensor | None:
        stored = self.layer.w_skip
        if stored is None:
            return None
        t = self._placed(finite(stored, stored.read()), stored)
        return t.T.contiguous() if self.layer.skip_back else t

    def rule(self) -> Activation:
        layer, stored = self.layer, self.layer.theta
        if stored is None:
            return layer.rule
        theta = finite(stored, stored.read())
        theta = theta.double().exp() if layer.log_theta else theta
        theta = theta.clamp_min(0.0) if layer.positive else theta
        if self.norm is not None:
            theta = theta.double() / self.norm
        wide = stored.dtype if theta.dtype == stored.dtype else _wide(torch.empty(0, dtype=stored.dtype))
        held = narrowed(str(stored), theta, wide if self.dtype is None else self.dtype)
        return JumpReLU(held.to(self.device))


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _is_one(gain: Any) -> bool:
    return bool((torch.as_tensor(gain, dtype=torch.float64) == 1.0).all())


def _gain(gain: Any) -> Tensor:
    """One for all, [d], or [slots, d] from a list with one for each slot."""
    t = torch.as_tensor(gain, dtype=torch.float64)
    return t[:, None] if t.ndim == 1 and isinstance(gain, list) else t


def _inverse(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, 1.0 / norm, torch.zeros_like(norm))


def _shifted(w_enc: Stored, transposed: bool, shift: Tensor) -> Tensor:
    """What a shift ([] or [d]) of the stream adds to pre-activations: [F] float64, some rows of the file at a time."""
    every = shift.double().expand(w_enc.shape[0 if transposed else 1])
    if not transposed:
        return torch.cat([chunk.double() @ every for chunk in w_enc.chunks()])
    total, at = torch.zeros(w_enc.shape[1], dtype=torch.float64), 0
    for chunk in w_enc.chunks():
        total += every[at : at + len(chunk)] @ chunk.double()
        at += len(chunk)
    return total


def assemble(
    contents: Contents, device: Any = None, dtype: torch.dtype | None = None, lazy: bool = True, cache: int = 4 << 30
) -> Transcoders:
    """Transcoders of these files, decoders left in them where `lazy`."""
    check(contents)
    kept = Cache(cache)
    readers = [Reader(layer, device, dtype, lazy, kept, keep=lazy) for layer in contents.layers]
    made = CrossLayerTranscoder if contents.cross else PerLayerTranscoders
    return made(
        [reader.w_enc() for reader in readers],
        [reader.b_enc() for reader in readers],
        [reader.w_dec() for reader in readers],
        [reader.b_dec() for reader in readers],
        [reader.rule() for reader in readers],
        [reader.w_skip() for reader in readers],
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


def flag(said_by: Path, config: dict[str, Any], name: str, otherwise: bool) -> bool:
    value = config.get(name, otherwise)
    if not isinstance(value, bool):
        raise ValueError(f"load: {said_by}: {name} must be true or false, got {value!r}")
    return value


def number(said_by: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= float_info.max:
        raise ValueError(f"load: {said_by}: {name} must be a finite number, got {value!r}")
    return float(value)
