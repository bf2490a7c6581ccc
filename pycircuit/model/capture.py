"""One forward of a transformers model, on one copy and without a tape, that leaves everything frozen behind.

Attention goes through transformers' attention interface, which hands over query and key after rotary
embedding and norms: no family needs code of its own. The rest is read by hooks on the modules that a family names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycircuit.ops import Attention, StoredAttention

from .attention_choice import use_attention_function
from .causal_attention import Windows, attend, attention_inputs, layer_of_module
from .families import Family
from .forward_lock import forward_lock
from .freed_memory import trim
from .frozen import FrozenLayer, FrozenModel, FrozenNorm
from .half_precision import sum_in_float32
from .hooks import Hooks, require_calls, stream_into, stream_out
from .linear_layers import fast_linear_layers
from .weights import NORMS, LayerWeights, ModelWeights, Norm, submodule

STREAMS = ("resid_in", "attention_out", "resid_mid", "mlp_normed", "mlp_in", "mlp_raw", "mlp_out")


@dataclass(eq=False)
class Captured:
    """A frozen model and its recorded streams, each [layers, positions, width]."""

    model: FrozenModel
    streams: dict[str, Tensor]


class ForwardRecord:
    """Everything that one forward leaves behind, filled in by hooks and by the attention function."""

    def __init__(self, family: Family, weights: ModelWeights, streams: dict[str, Tensor], stored: bool) -> None:
        self.family = family
        self.weights = weights
        self.streams = streams
        self.stored = stored
        self.layer_of: dict[int, int] = {}
        self.attention: dict[int, Attention] = {}
        self.norms: dict[tuple[int, str], FrozenNorm] = {}
        self.windows = Windows()
        self.written: set[tuple[str, int]] = set()
        self.position_part: Tensor | None = None
        self.first_stream: Tensor | None = None
        self.final_stream: Tensor | None = None

    def write(self, name: str, layer: int, value: Tensor) -> None:
        """Record a stream of a layer, if it is wanted.

        value: [1, positions, width].
        """
        if name in self.streams:
            self.streams[name][layer] = value[0]
            self.written.add((name, layer))

    def attend(self, owner: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """Compute attention of one layer and keep it: transformers' attention function."""
        layer = layer_of_module(self.layer_of, owner)
        dtype = self.weights.dtype
        window = self.windows.window(options["attention_mask"])
        attention = attention_inputs(owner, layer, query, key, options, window, dtype)
        size = attention.positions
        pattern = query.new_zeros(attention.heads, size, size, dtype=dtype) if self.stored else None
        out = attend(attention, value[0].to(dtype), pattern)
        self.attention[layer] = attention if pattern is None else StoredAttention(pattern, attention.groups)
        return out.transpose(0, 1)[None].to(query.dtype)

    def require_complete(self) -> None:
        """Raise if anything is missing that a frozen model is made of, or a stream holds what was in memory before."""
        depth = range(len(self.weights.layers))
        wanted = {"attention": depth, "resid_in": range(1), "final_norm": range(-1, 0)}
        wanted |= dict.fromkeys(self.streams, depth)
        wanted |= {name: depth for name in NORMS if getattr(self.family, name) is not None}
        written = {("attention", layer) for layer in self.attention} | self.written
        written |= {(name, layer) for layer, name in self.norms}
        if self.first_stream is not None:
            written.add(("resid_in", 0))
        if self.family.position_embedding is not None:
            wanted["position_embedding"] = range(1)
        if self.position_part is not None:
            written.add(("position_embedding", 0))
        require_calls(self.family, wanted, written)

    def frozen_model(self, ids: Tensor) -> FrozenModel:
        """The frozen model of a complete record."""
        weights, first, final = self.weights, self.first_stream, self.final_stream
        assert first is not None and final is not None  # require_complete has looked
        return FrozenModel(
            tokens=ids,
            embeddings=first if self.position_part is None else first - self.position_part,
            position_part=self.position_part,
            layers=tuple(self._frozen_layer(i, layer) for i, layer in enumerate(weights.layers)),
            final_stream=final,
            final_norm=self.norms[-1, "final_norm"],
            unembedding=weights.unembedding,
            unembedding_bias=weights.unembedding_bias,
            unembedding_mean=weights.unembedding_mean,
            final_softcap=weights.final_softcap,
        )

    def _frozen_layer(self, layer: int, weights: LayerWeights) -> FrozenLayer:
        return FrozenLayer(
            attention_norm=self.norms.get((layer, "attention_norm")),
            w_v=weights.w_v,
            b_v=weights.b_v,
            w_o=weights.w_o,
            b_o=weights.b_o,
            back_v=weights.back_v,
            back_o=weights.back_o,
            attention=self.attention[layer],
            post_attention_norm=self.norms.get((layer, "post_attention_norm")),
            mlp_norm=self.norms.get((layer, "mlp_norm")),
            post_mlp_norm=self.norms.get((layer, "post_mlp_norm")),
            parallel=self.weights.parallel,
            heads=weights.heads,
            kv_heads=weights.kv_heads,
        )


@dataclass(frozen=True, eq=False)
class _RecordingHooks:
    """Hooks on the modules that a family names, which write into a record."""

    record: ForwardRecord
    exact_norms: bool
    lean: bool

    def add(self, hooks: Hooks, model: nn.Module) -> None:
        """Put hooks on every layer, on the position embedding and on the final norm."""
        family, record = self.record.family, self.record
        layers = list(submodule(model, family.layers, family).children())
        for i, (layer, weights) in enumerate(zip(layers, record.weights.layers, strict=True)):
            self._add_layer(hooks, i, layer, weights)
        if family.position_embedding is not None:
            _after(hooks, submodule(model, family.position_embedding, family), self._record_positions)
        final_norm = submodule(model, family.final_norm, family)
        self._add_norm(hooks, -1, final_norm, "final_norm", record.weights.final_norm)

    def _add_layer(self, hooks: Hooks, index: int, layer: nn.Module, weights: LayerWeights) -> None:
        family, write = self.record.family, self.record.write
        self.record.layer_of.update((id(m), index) for m in layer.modules())
        _before(hooks, layer, lambda x: self._record_input(index, x))
        for name in NORMS:
            path, norm = getattr(family, name), getattr(weights, name)
            if path is not None:
                self._add_norm(hooks, index, submodule(layer, path, family), name, norm)
        mlp = submodule(layer, family.mlp, family)
        attention_end = submodule(layer, family.post_attention_norm or family.output, family)
        mlp_begin = submodule(layer, family.mlp_norm or family.mlp, family)
        mlp_end = submodule(layer, family.post_mlp_norm or family.mlp, family)
        _after(hooks, attention_end, lambda out: write("attention_out", index, out))
        _before(hooks, mlp_begin, lambda x: write("resid_mid", index, x))
        _before(hooks, mlp, lambda x: write("mlp_in", index, x))
        if self.lean:
            for owner in (layer, mlp):
                _before(hooks, owner, lambda _: trim())
        _after(hooks, mlp, lambda out: write("mlp_raw", index, out))
        _after(hooks, mlp_end, lambda out: write("mlp_out", index, out))

    def _record_input(self, index: int, x: Tensor) -> None:
        self.record.write("resid_in", index, x)
        if index == 0:
            self.record.first_stream = x[0].to(self.record.weights.dtype)

    def _record_positions(self, out: Tensor) -> None:
        self.record.position_part = out.reshape(-1, out.shape[-1]).to(self.record.weights.dtype)

    def _add_norm(self, hooks: Hooks, index: int, owner: nn.Module, name: str, norm: Norm) -> None:
        """Denominators from the norm's own input.

        In float64 an exact output takes the place of transformers' own.
        """

        def freeze(args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> Tensor | None:
            x = stream_into(args, kwargs)
            frozen = self.record.norms[index, name] = norm.freeze(x[0])
            if index < 0:
                self.record.final_stream = x[0].to(self.record.weights.dtype)
            if name == "mlp_norm" and "mlp_normed" in self.record.streams:
                normed = frozen.without_gain().forward(x[0].to(frozen.sigma.dtype))
                self.record.write("mlp_normed", index, normed[None])
            exact = self.exact_norms and x.dtype == torch.float64
            return frozen.forward(x[0])[None] if exact else None

        hooks.after(owner, freeze)


def _before(hooks: Hooks, owner: nn.Module, function: Callable[[Tensor], None]) -> None:
    hooks.before(owner, lambda args, kwargs: function(stream_into(args, kwargs)))


def _after(hooks: Hooks, owner: nn.Module, function: Callable[[Tensor], None]) -> None:
    hooks.after(owner, lambda args, kwargs, out: function(stream_out(out)))


def capture(
    model: Any,
    family: Family,
    weights: ModelWeights,
    ids: Tensor,
    record: Sequence[str] = (),
    stored: bool = True,
    settle: bool = True,
    exact_norms: bool = True,
    lean: bool = False,
) -> Captured:
    """Run the prompt once and freeze it.

    ids: [positions]; record: the STREAMS to keep.

    stored: keep attention patterns, otherwise query, key and log-sum-exp. settle: from a model in half
    precision take patterns and MLP outputs, and add up the streams between again in float32 (see `half_precision`).
    exact_norms: in a float64 model compute norms' outputs in float64, where transformers goes through float32.
    lean: give back what each layer freed, so that the next one's tensors need not lie beside its holes.
    """
    if model.training:
        raise ValueError("capture: model must be in evaluation mode, got one in training; call model.hf_model.eval()")
    half = settle and weights.stored != weights.dtype
    wanted = {"mlp_raw"} if half else {_recorded(name, family) for name in record}
    shape = (len(weights.layers), len(ids), weights.width)
    streams = {name: torch.empty(shape, dtype=weights.dtype, device=weights.device) for name in wanted}
    forward = ForwardRecord(family, weights, streams, stored)
    with forward_lock(model), fast_linear_layers(weights.device), Hooks() as hooks:
        _RecordingHooks(forward, exact_norms, lean).add(hooks, model)
        with torch.no_grad(), use_attention_function(model, forward.attend):
            model.base_model(input_ids=ids[None], use_cache=False)
    forward.require_complete()
    frozen = forward.frozen_model(ids)
    if half:
        frozen, streams = sum_in_float32(frozen, weights, streams["mlp_raw"], record)
        return Captured(frozen, streams)
    return Captured(frozen, {name: streams[_recorded(name, family)] for name in record})


def _recorded(name: str, family: Family) -> str:
    """The stream that holds `name`: without a norm before the MLP, everything it reads is one stream."""
    return "mlp_in" if name == "mlp_normed" and family.mlp_norm is None else name
