"""Transcoders in memory: the stream they read, the features that are active, and what those write."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.files import memory_maps
from pycircuit.ops import Activation, BatchTopK, FileRows, JumpReLU, ReLU, SparseFeatures, TopK
from pycircuit.ops.torch_settings import without_autocast

from .lazy import LazyRows

Reads = Literal["resid_mid", "mlp_normed", "mlp_in"]
Writes = Literal["mlp_out", "mlp_raw"]
READS: tuple[Reads, ...] = get_args(Reads)
WRITES: tuple[Writes, ...] = get_args(Writes)

PerLayer: TypeAlias = Sequence[Tensor | None] | Tensor  # one entry a layer
Decoders: TypeAlias = Sequence[Tensor | FileRows | None] | Tensor
Rules: TypeAlias = Activation | Sequence[Activation | None]  # one for all layers, or one a layer


class ModelShape(Protocol):
    """Sizes, type and device of a model that transcoders are checked against."""

    @property
    def depth(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def _detached(t: Any) -> Any:
    """A tensor's memory without a gradient: parameters of a module may be given as they are, and nothing is taped."""
    return t.detach() if isinstance(t, Tensor) and t.requires_grad else t


def _entries(op: str, name: str, value: Any, count: int) -> list[Any]:
    if value is None:
        return [None] * count
    entries = [_detached(t) for t in value]
    if len(entries) != count:
        got = len(entries)
        raise ValueError(f"{op}: {name} must have one entry for each of the {count} layers of w_enc, got {got}")
    return entries


def _activations(op: str, activation: Any, count: int) -> list[Activation]:
    """One rule a layer, from one for all, a list, or a JumpReLU whose theta has a first dimension of layers."""
    if isinstance(activation, JumpReLU):
        theta = activation.theta
        if isinstance(theta, list | tuple) or (isinstance(theta, Tensor) and theta.ndim == 2):
            return [JumpReLU(t) for t in _entries(op, "activation.theta", theta, count)]
    if isinstance(activation, list | tuple):
        return _entries(op, "activation", activation, count)
    return [activation] * count


def _matches(op: str, layer: int, name: str, t: Any, expected: tuple[int | None, ...], why: str) -> None:
    got = tuple(t.shape)
    if len(got) != len(expected) or any(e is not None and e != g for e, g in zip(expected, got, strict=True)):
        rule = "[" + ", ".join("any" if e is None else str(e) for e in expected) + "]"
        raise ValueError(f"{op}: layer {layer}: {name} must have shape {rule} ({why}), got {list(got)}")


class Transcoders(ABC):
    """One entry a layer in every list; None in w_enc, b_enc and w_dec where a layer has no transcoder."""

    def __init__(
        self,
        w_enc: PerLayer,
        b_enc: PerLayer,
        w_dec: Decoders,
        b_dec: PerLayer | None,
        activation: Rules,
        w_skip: PerLayer | None,
        reads: Reads,
        writes: Writes,
    ) -> None:
        op = type(self).__name__
        self.w_enc = [_detached(t) for t in w_enc]
        count = len(self.w_enc)
        self.b_enc = _entries(op, "b_enc", b_enc, count)
        self.w_dec = _entries(op, "w_dec", w_dec, count)
        self.b_dec = _entries(op, "b_dec", b_dec, count)
        self.w_skip = _entries(op, "w_skip", w_skip, count)
        rules = _activations(op, activation, count)
        self.activation = [JumpReLU(_detached(r.theta)) if isinstance(r, JumpReLU) else r for r in rules]
        self.reads: Reads = reads
        self.writes: Writes = writes
        for name, value, allowed in (("reads", reads, READS), ("writes", writes, WRITES)):
            if value not in allowed:
                raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")
        for layer in range(count):
            self._check_layer(op, layer)

    @property
    def depth(self) -> int:
        """The number of layers, those without a transcoder included."""
        return len(self.w_enc)

    def size(self, layer: int) -> int:
        """The number of features that read at a layer."""
        return 0 if self.w_enc[layer] is None else self.w_enc[layer].shape[0]

    def _check_layer(self, op: str, layer: int) -> None:
        w_enc, b_enc, w_dec = self.w_enc[layer], self.b_enc[layer], self.w_dec[layer]
        if w_enc is None:
            if b_enc is not None or w_dec is not None:
                raise ValueError(f"{op}: layer {layer}: w_enc must be given as b_enc or w_dec is, got None")
            return
        for name, t in (("w_enc", w_enc), ("b_enc", b_enc), ("w_dec", w_dec)):
            kinds = (Tensor, FileRows) if name == "w_dec" else (Tensor,)
            if not isinstance(t, kinds):
                raise TypeError(f"{op}: layer {layer}: {name} must be a torch tensor, got {type(t).__name__}")
        if not isinstance(self.activation[layer], ReLU | JumpReLU | TopK | BatchTopK):
            known = "pc.ReLU(), pc.JumpReLU(theta), pc.TopK(k) or pc.BatchTopK(threshold)"
            got = type(self.activation[layer]).__name__
            raise TypeError(f"{op}: layer {layer}: activation must be {known}, got {got}")
        size = w_enc.shape[0]
        _matches(op, layer, "w_enc", w_enc, (None, None), "features x width")
        _matches(op, layer, "b_enc", b_enc, (size,), f"one for each row of w_enc {list(w_enc.shape)}")
        self._check_decoder(op, layer, size)

    @abstractmethod
    def _check_decoder(self, op: str, layer: int, size: int) -> None: ...

    @abstractmethod
    def sources(self, layer: int) -> range:
        """The layers whose features may write to this layer's MLP output."""

    @abstractmethod
    def decoder(self, source: int, target: int) -> Any:
        """Decoder of the source layer's features at the target layer: [features, width], a view that may be strided."""

    @abstractmethod
    def _add_features(self, out: Tensor, features: Sequence[SparseFeatures], sign: float) -> None:
        """Add sign * everything the features write to out, [layers, positions, width]."""

    def writes_to(self, layer: int) -> bool:
        """True if any feature can write to this layer."""
        return any(self.w_enc[s] is not None for s in self.sources(layer))

    def bias(self, layer: int) -> Tensor | None:
        """b_dec of a layer some feature can write to: [width]."""
        return self.b_dec[layer] if self.writes_to(layer) else None

    def check(self, model: ModelShape) -> None:
        """Raise an error unless layers, widths, types and device are the model's."""
        op, width = type(self).__name__, model.width
        if self.depth != model.depth:
            raise ValueError(
                f"{op}: transcoders must have one entry for each of the model's {model.depth} layers, got "
                f"{self.depth}; put None where a layer has none"
            )
        for layer in range(self.depth):
            self._check_width(op, layer, width)
            named = {n: getattr(self, n)[layer] for n in ("w_enc", "b_enc", "w_dec", "b_dec", "w_skip")}
            for name, t in named.items():
                if t is not None:
                    self._check_kind(op, layer, name, t, model)

    def _check_width(self, op: str, layer: int, width: int) -> None:
        why = f"the model's width is {width}"
        if self.w_enc[layer] is not None:
            size = self.size(layer)
            _matches(op, layer, "w_enc", self.w_enc[layer], (size, width), why)
            _matches(op, layer, "w_dec", self.w_dec[layer], (*self.w_dec[layer].shape[:-1], width), why)
        if self.b_dec[layer] is not None:
            _matches(op, layer, "b_dec", self.b_dec[layer], (width,), why)
        if self.w_skip[layer] is not None:
            _matches(op, layer, "w_skip", self.w_skip[layer], (width, width), why)

    @staticmethod
    def _check_kind(op: str, layer: int, name: str, t: Any, model: ModelShape) -> None:
        if (t.dtype == torch.float64) != (model.dtype == torch.float64):
            got = f"{t.dtype} against the model's {model.dtype}"
            rule = "must be float64 exactly if the model is"
            raise TypeError(f"{op}: layer {layer}: {name} {rule}, got {got}; use .to()")
        if t.dtype == torch.float16 and model.device.type == "cuda":
            raise TypeError(
                f"{op}: layer {layer}: {name} must be float32 or bfloat16 on a GPU, whose kernels take no other, got "
                "float16; use .to(torch.bfloat16), or .to(torch.float32), which is exact"
            )
        if isinstance(t, Tensor) and t.device != model.device:
            raise ValueError(
                f"{op}: layer {layer}: {name} must be on {model.device} as the model is, got {t.device}; use .to()"
            )

    def encode(self, layer: int, x: Tensor, ignore: int = 0) -> SparseFeatures:
        """Active features of a layer; none at the first `ignore` positions. x: [positions, width], what it reads."""
        if self.w_enc[layer] is None:
            row_ptr = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
            return SparseFeatures(row_ptr, row_ptr.new_empty(0), x.new_empty(0))
        memory_maps.check_unchanged(self.w_enc[layer])
        try:
            features = ops.encode(x, self.w_enc[layer], self.b_enc[layer], self.activation[layer], ignore)
        except ValueError as error:
            raise ValueError(f"encode: layer {layer}: {str(error).removeprefix('encode: ')}") from None
        memory_maps.drop_resident_pages(self.w_enc[layer])
        return features

    def reconstruct(self, features: Sequence[SparseFeatures], x: Tensor | None = None, ignore: int = 0) -> Tensor:
        """Reconstruction of the MLP outputs: [layers, positions, width].

        features: one entry a layer; x: [layers, positions, width], what is read, needed for a skip. Features and
        b_dec write past the first `ignore` positions only; the skip, which is no node, everywhere.
        """
        like = self._like(features, x)
        out = like.new_zeros(self.depth, features[0].positions, self._width())
        self.add_to(out, features, x, ignore)
        return out

    @without_autocast()
    def add_to(
        self, out: Tensor, features: Sequence[SparseFeatures], x: Tensor | None, ignore: int = 0, sign: float = 1.0
    ) -> None:
        """Add sign * the reconstruction to out, [layers, positions, width], in place."""
        if len(features) != self.depth:
            raise ValueError(
                f"reconstruct: features must have one entry for each of {self.depth} layers, got {len(features)}"
            )
        self._add_features(out, features, sign)
        for layer in range(self.depth):
            bias, skip = self.bias(layer), self.w_skip[layer]
            if bias is not None:
                out[layer, ignore:] += sign * bias.to(out.dtype)
            if skip is not None:
                if x is None:
                    raise ValueError(f"reconstruct: x must be given, layer {layer} has a skip, got None")
                out[layer].addmm_(x[layer], skip.to(out.dtype), alpha=sign)

    def to(self, *args: Any, **kwargs: Any) -> Transcoders:
        """A copy on another device or in another float type, by the arguments of `Tensor.to`.

        A decoder left in a file stays there, and is converted as it is read.
        """

        def moved(entries: list[Any]) -> list[Any]:
            return [t.to(*args, **kwargs) if isinstance(t, Tensor | LazyRows) else t for t in entries]

        rules = [JumpReLU(*moved([r.theta])) if isinstance(r, JumpReLU) else r for r in self.activation]
        w_enc, b_enc, w_dec, b_dec = (moved(t) for t in (self.w_enc, self.b_enc, self.w_dec, self.b_dec))
        return type(self)(w_enc, b_enc, w_dec, b_dec, rules, moved(self.w_skip), self.reads, self.writes)

    def save(self, path: str | os.PathLike[str], model: str | None = None, scan: str | None = None) -> Path:
        """Write a new folder, as `pycircuit.transcoders.save` does."""
        io = import_module("pycircuit.transcoders.io")  # resolved late: that module imports this one
        folder: Path = io.save(self, path, model, scan)
        return folder

    def _width(self) -> int:
        known = [*self.w_dec, *self.b_dec, *self.w_skip]
        return int(next(t.shape[-1] for t in known if t is not None))

    @staticmethod
    def _like(features: Sequence[SparseFeatures], x: Tensor | None) -> Tensor:
        return features[0].value if x is None else x

    def __repr__(self) -> str:
        sizes = [self.size(layer) for layer in range(self.depth)]
        features = sizes[0] if len(set(sizes)) == 1 else sizes
        return f"{type(self).__name__}(layers={self.depth}, features={features}, {self.reads} -> {self.writes})"


class PerLayerTranscoders(Transcoders):
    """Each layer's features read and write there: w_enc[l]: [F, d], b_enc[l]: [F], w_dec[l]: [F, d], b_dec[l]: [d].

    w_skip[l]: [d, d] adds x @ w_skip[l]. activation: one rule, or one a layer.

    reads: "resid_mid" (the stream before the MLP's norm), "mlp_normed" (after the norm, without its gain) or "mlp_in"
    (the MLP's input). writes: "mlp_out" (what the MLP adds to the stream) or "mlp_raw" (before a norm after the MLP).
    """

    def __init__(
        self,
        w_enc: PerLayer,
        b_enc: PerLayer,
        w_dec: Decoders,
        b_dec: PerLayer | None = None,
        activation: Rules = ReLU(),  # noqa: B008 - frozen
        w_skip: PerLayer | None = None,
        reads: Reads = "mlp_in",
        writes: Writes = "mlp_out",
    ) -> None:
        super().__init__(w_enc, b_enc, w_dec, b_dec, activation, w_skip, reads, writes)

    def _check_decoder(self, op: str, layer: int, size: int) -> None:
        _matches(op, layer, "w_dec", self.w_dec[layer], (size, None), f"{size} features of w_enc x width")

    def sources(self, layer: int) -> range:
        return range(layer, layer + 1)

    def decoder(self, source: int, target: int) -> Any:
        if source != target or self.w_dec[source] is None:
            raise ValueError(f"decoder: features must write to their own layer, got {source} -> {target}")
        return self.w_dec[source]

    def _add_features(self, out: Tensor, features: Sequence[SparseFeatures], sign: float) -> None:
        for layer, active in enumerate(features):
            if active.count:
                out[layer].add_(ops.decode(active, self.w_dec[layer]), alpha=sign)


class CrossLayerTranscoder(Transcoders):
    """Features of layer l write to every layer from l on: w_enc[l]: [F, d], b_enc[l]: [F], w_dec[l]: [F, L - l, d].

    b_dec[l]: [d] belongs to the layer written to. w_skip[l]: [d, d] adds x @ w_skip[l] at its own layer. activation,
    reads, writes: as of PerLayerTranscoders.
    """

    def __init__(
        self,
        w_enc: PerLayer,
        b_enc: PerLayer,
        w_dec: Decoders,
        b_dec: PerLayer | None = None,
        activation: Rules = ReLU(),  # noqa: B008 - frozen
        w_skip: PerLayer | None = None,
        reads: Reads = "resid_mid",
        writes: Writes = "mlp_out",
    ) -> None:
        super().__init__(w_enc, b_enc, w_dec, b_dec, activation, w_skip, reads, writes)

    def _check_decoder(self, op: str, layer: int, size: int) -> None:
        slots = self.depth - layer
        why = f"{size} features of w_enc x the {slots} layers from {layer} on x width"
        _matches(op, layer, "w_dec", self.w_dec[layer], (size, slots, None), why)

    def sources(self, layer: int) -> range:
        return range(layer + 1)

    def decoder(self, source: int, target: int) -> Any:
        w_dec = self.w_dec[source]
        if w_dec is None or not source <= target < self.depth:
            raise ValueError(f"decoder: features must write to their layer or a later one, got {source} -> {target}")
        if isinstance(w_dec, LazyRows):
            return w_dec.slot(target - source)
        if isinstance(w_dec, FileRows):
            raise TypeError(f"decoder: layer {source} must be in memory to take one of its slots, got rows in a file")
        return w_dec[:, target - source]

    def _add_features(self, out: Tensor, features: Sequence[SparseFeatures], sign: float) -> None:
        for source, active in enumerate(features):
            if active.count:
                out[source:].add_(ops.decode(active, self.w_dec[source]), alpha=sign)
