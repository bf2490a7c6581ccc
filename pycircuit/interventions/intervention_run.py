"""One plain forward of a prompt, then many changed ones as a batch, from the first layer that changes on.

The plain forward leaves behind what every layer was called with; the batch calls the layers in the same way itself,
so that nothing below the first change runs again and no family needs code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from pycircuit.model.capture import Captured, attend, capture, described, layer_at, window_of
from pycircuit.model.frozen import FrozenModel, capped_logits, mix
from pycircuit.model.hooks import Hooks, attending
from pycircuit.model.replacement import ReplacementModel
from pycircuit.model.sites import Held, sites
from pycircuit.model.weights import NORMS, module
from pycircuit.ops import Attention, SparseFeatures

from .intervention import Hold
from .steering import Entries, Steering, activations_at

BATCH_POSITIONS = 4096  # of variants run together


@dataclass(frozen=True, eq=False)
class State:
    """Where a forward came to. read: [layers from `first` on, positions, width], what transcoders read; final:
    [positions, width], the stream after the final norm; below: the forward whose lower layers this one shares."""

    model: ReplacementModel
    first: int
    read: Tensor
    final: Tensor
    below: State | None = None

    def reads(self, layer: int) -> Tensor:
        """[positions, width]"""
        if layer >= self.first:
            return self.read[layer - self.first]
        assert self.below is not None  # the plain forward begins at layer 0
        return self.below.reads(layer)

    @cached_property
    def logits(self) -> Tensor:
        """Softcap included: [positions, vocabulary]."""
        return capped_logits(self.model.weights, self.final)

    def probabilities(self) -> Tensor:
        """Of the token after the last: [vocabulary]."""
        return capped_logits(self.model.weights, self.final[-1:])[0].softmax(-1)

    @cached_property
    def features(self) -> tuple[SparseFeatures, ...]:
        """Active features, one entry a layer."""
        shared = () if self.below is None else self.below.features[: self.first]
        encode, ignore = self.model.transcoders.encode, self.model.ignore_positions
        own = (encode(layer, self.reads(layer), ignore) for layer in range(self.first, self.model.depth))
        return (*shared, *own)


@dataclass(frozen=True, eq=False)
class Plain:
    """A prompt's own forward. calls: how each layer was called; written: [layers, positions, width]; entered: the
    stream at every layer's beginning, [layers, positions, width]."""

    model: ReplacementModel
    frozen: FrozenModel
    state: State
    written: Tensor
    entered: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def positions(self) -> int:
        return self.frozen.positions

    def original(self, layer: int, e: Entries, _: Tensor) -> Tensor:
        """The prompt's own activations of features that change: [n]."""
        row = e.position[e.place()]
        return activations_at(self.state.features[layer], row, e.index, self.model.transcoders.size(layer))


def plain(model: ReplacementModel, ids: Tensor, patterns: bool) -> Plain:
    """Run the prompt as it is. patterns: attention is going to be held."""
    reads, writes = model.transcoders.reads, model.transcoders.writes
    stored = patterns and model.stores_patterns(len(ids))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with Hooks() as hooks:
        for layer in module(model.hf_model, model.family.layers, model.family).children():
            hooks.before(layer, lambda args, kwargs: calls.append((args, kwargs)))
        captured: Captured = capture(
            model.hf_model, model.family, model.weights, ids, (reads, writes, "resid_in"), stored, settle=False
        )
    streams, frozen = captured.streams, captured.model
    state = State(model, 0, streams[reads], frozen.final_norm.forward(frozen.final_stream))
    return Plain(model, frozen, state, streams[writes], streams["resid_in"], calls)


@dataclass(eq=False)
class Changed:
    """A batch of changed forwards of one prompt."""

    plain: Plain
    steering: Steering
    hold: Hold
    rows: int
    first: int
    read: Tensor = field(init=False)
    windows: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # a mask that lives keeps its id

    def run(self) -> list[State]:
        """One state a row. Layers below `first` do not run; the model must not be running elsewhere."""
        model, start = self.plain.model, self.plain.state
        self.read = start.read.new_empty(self.rows, model.depth - self.first, *start.read.shape[1:])
        row, reads, writes = model.family, model.transcoders.reads, model.transcoders.writes
        held, first = self._held(), self.first
        hooks = sites(model.hf_model, row, model.weights, reads, writes, self._read, self._write, held, first)
        with hooks, attending(model.hf_model, self._attend):
            stream = self.steering.write(-1, self.plain.entered[self.first].expand(self.rows, -1, -1))
            for layer, (args, kwargs) in list(zip(self._layers, self.plain.calls, strict=True))[self.first :]:
                stream = _call(layer, stream, args, kwargs)
            final = module(model.hf_model, row.final_norm, row)(stream).to(model.dtype)
        return [State(model, self.first, r, f, start) for r, f in zip(self.read, final, strict=True)]

    @cached_property
    def _layers(self) -> list[nn.Module]:
        model = self.plain.model
        return list(module(model.hf_model, model.family.layers, model.family).children())

    @cached_property
    def _layer_of(self) -> dict[int, int]:
        return {id(m): at for at, layer in enumerate(self._layers) for m in layer.modules()}

    def _held(self) -> Held:
        frozen, found = self.plain.frozen, {}
        for at, layer in enumerate(frozen.layers):
            if self.hold.norms(at):
                found.update({(at, name): getattr(layer, name) for name in NORMS})
        if self.hold.norms(len(frozen.layers)):
            found[-1, "final_norm"] = frozen.final_norm
        return {key: norm for key, norm in found.items() if norm is not None}

    def _read(self, layer: int, x: Tensor) -> None:
        self.read[:, layer - self.first] = x
        self.steering.read(layer, x)

    def _write(self, layer: int, y: Tensor) -> Tensor:
        if layer in self.hold.layers:
            y = self.plain.written[layer].expand_as(y)
            skip = self.plain.model.transcoders.w_skip[layer]
            if skip is not None:
                y = y + (self.read[:, layer - self.first] - self.plain.state.reads(layer)) @ skip.to(y.dtype)
        return self.steering.write(layer, y)

    def _attend(self, owner: nn.Module, query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]) -> Tensor:
        """query: [rows, heads, positions, width] -> [rows, positions, heads, width]."""
        layer, wide = layer_at(self._layer_of, owner), self.plain.model.dtype
        if self.hold.patterns(layer):
            out = _mixed(self.plain.frozen.layers[layer].attention, value.to(wide))
        else:
            draft = described(owner, layer, query, key, how, self._window(how["attention_mask"]), wide)
            out = attend(draft, value.flatten(0, 1).to(wide), None).unflatten(0, query.shape[:2]).transpose(1, 2)
        return out.to(query.dtype)

    def _window(self, mask: Tensor) -> int:
        if id(mask) not in self.windows:  # layers of a kind share one mask
            self.windows[id(mask)] = (mask, window_of(mask[0, 0]))
        return self.windows[id(mask)][1]


def _mixed(attention: Attention, value: Tensor) -> Tensor:
    """A pattern applied to the values of all rows at once: [rows, kv_heads, positions, width] -> as `_attend`."""
    together = mix(attention, value.permute(1, 2, 0, 3).flatten(2))
    return together.unflatten(2, (len(value), -1)).permute(2, 1, 0, 3)


def _call(layer: nn.Module, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A layer called as the model called it, on another stream."""
    if args:
        out = layer(stream.to(args[0].dtype), *args[1:], **kwargs)
    else:
        out = layer(**{**kwargs, "hidden_states": stream.to(kwargs["hidden_states"].dtype)})
    return out[0] if isinstance(out, tuple) else out
