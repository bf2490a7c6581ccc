"""One forward of a prompt as it is, then many changed ones as a batch, from the first layer that changes on.

The baseline leaves behind how every layer was called; the batch calls the layers in the same way itself, so that
nothing below the first change runs again and no family needs code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from pycircuit.model.attention_choice import use_attention_function
from pycircuit.model.capture import capture
from pycircuit.model.causal_attention import Windows, attend, attention_inputs, layer_of_module
from pycircuit.model.frozen import FrozenModel, capped_logits, mix
from pycircuit.model.hooks import Hooks
from pycircuit.model.replacement import ReplacementModel
from pycircuit.model.transcoder_hooks import FrozenNorms, transcoder_hooks
from pycircuit.model.weights import NORMS, submodule
from pycircuit.ops import Attention, SparseFeatures

from .intervention import Frozen
from .steering import FeatureChanges, Steering, activations_at

BATCH_POSITIONS = 4096  # positions of variants run together

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


@dataclass(frozen=True, eq=False)
class State:
    """The streams of one finished forward.

    transcoder_inputs: [layers from `first` on, positions, width]; final: [positions, width], the stream after the
    final norm; below: the forward whose lower layers this one shares.
    """

    model: ReplacementModel
    first: int
    transcoder_inputs: Tensor
    final: Tensor
    below: State | None = None

    def reads(self, layer: int) -> Tensor:
        """The input of a layer's transcoder: [positions, width]."""
        if layer >= self.first:
            return self.transcoder_inputs[layer - self.first]
        assert self.below is not None  # the baseline begins at layer 0
        return self.below.reads(layer)

    @cached_property
    def logits(self) -> Tensor:
        """Logits, softcap included: [positions, vocabulary]."""
        return capped_logits(self.model.weights, self.final)

    def probabilities(self) -> Tensor:
        """Probabilities of the token after the last: [vocabulary]."""
        return capped_logits(self.model.weights, self.final[-1:])[0].softmax(-1)

    @cached_property
    def features(self) -> tuple[SparseFeatures, ...]:
        """Active features, one entry a layer."""
        shared = () if self.below is None else self.below.features[: self.first]
        encode, ignore = self.model.transcoders.encode, self.model.ignore_positions
        own = (encode(layer, self.reads(layer), ignore) for layer in range(self.first, self.model.depth))
        return (*shared, *own)


@dataclass(frozen=True, eq=False)
class BaselineRun:
    """A prompt's own forward.

    written: [layers, positions, width], what transcoders replace; layer_inputs: [layers, positions, width], the
    stream at every layer's beginning; calls: the arguments that each layer was called with.
    """

    model: ReplacementModel
    frozen: FrozenModel
    state: State
    written: Tensor
    layer_inputs: Tensor
    calls: list[Call]

    @property
    def positions(self) -> int:
        return self.frozen.positions

    def original(self, layer: int, changes: FeatureChanges, _: Tensor) -> Tensor:
        """The prompt's own activations of features that change: [n]."""
        position = changes.position[changes.place()]
        size = self.model.transcoders.size(layer)
        return activations_at(self.state.features[layer], position, changes.index, size)


def run_baseline(model: ReplacementModel, ids: Tensor, patterns: bool) -> BaselineRun:
    """Run the prompt as it is.

    patterns: attention patterns are going to be frozen.
    """
    reads, writes = model.transcoders.reads, model.transcoders.writes
    stored = patterns and model.stores_patterns(len(ids))
    record = (reads, writes, "resid_in")
    calls: list[Call] = []
    with Hooks() as hooks:
        for layer in submodule(model.hf_model, model.family.layers, model.family).children():
            hooks.before(layer, lambda args, kwargs: calls.append((args, kwargs)))
        captured = capture(model.hf_model, model.family, model.weights, ids, record, stored, settle=False)
    streams, frozen = captured.streams, captured.model
    state = State(model, 0, streams[reads], frozen.final_norm.forward(frozen.final_stream))
    return BaselineRun(model, frozen, state, streams[writes], streams["resid_in"], calls)


class InterventionRun:
    """A batch of changed forwards of one prompt.

    rows: their number; first: the first layer that runs.
    """

    def __init__(self, baseline: BaselineRun, steering: Steering, frozen: Frozen, rows: int, first: int) -> None:
        model, inputs = baseline.model, baseline.state.transcoder_inputs
        self.baseline = baseline
        self.steering = steering
        self.frozen = frozen
        self.rows = rows
        self.first = first
        self.transcoder_inputs = inputs.new_empty(rows, model.depth - first, *inputs.shape[1:])
        self.windows = Windows()
        self.layers = list(submodule(model.hf_model, model.family.layers, model.family).children())
        self.layer_of = {id(m): i for i, layer in enumerate(self.layers) for m in layer.modules()}

    def run(self) -> list[State]:
        """Run the layers from `first` on and return one state a row; the model must not be running elsewhere."""
        model, baseline = self.baseline.model, self.baseline
        hooks = transcoder_hooks(
            model.hf_model,
            model.family,
            model.weights,
            model.transcoders.reads,
            model.transcoders.writes,
            self._read,
            self._write,
            self._frozen_norms(),
            self.first,
        )
        with hooks, use_attention_function(model.hf_model, self._attend):
            stream = self.steering.write(-1, baseline.layer_inputs[self.first].expand(self.rows, -1, -1))
            for layer, (args, kwargs) in list(zip(self.layers, baseline.calls, strict=True))[self.first :]:
                stream = _call(layer, stream, args, kwargs)
            final = submodule(model.hf_model, model.family.final_norm, model.family)(stream).to(model.dtype)
        return [
            State(model, self.first, inputs, last, baseline.state)
            for inputs, last in zip(self.transcoder_inputs, final, strict=True)
        ]

    def _frozen_norms(self) -> FrozenNorms:
        model = self.baseline.frozen
        norms = {
            (i, name): getattr(layer, name)
            for i, layer in enumerate(model.layers)
            if self.frozen.has_norms(i)
            for name in NORMS
        }
        if self.frozen.has_norms(len(model.layers)):
            norms[-1, "final_norm"] = model.final_norm
        return {key: norm for key, norm in norms.items() if norm is not None}

    def _read(self, layer: int, x: Tensor) -> None:
        self.transcoder_inputs[:, layer - self.first] = x
        self.steering.read(layer, x)

    def _write(self, layer: int, y: Tensor) -> Tensor:
        if layer in self.frozen.layers:
            y = self.baseline.written[layer].expand_as(y)
            skip = self.baseline.model.transcoders.w_skip[layer]
            if skip is not None:
                moved = self.transcoder_inputs[:, layer - self.first] - self.baseline.state.reads(layer)
                y = y + moved @ skip.to(y.dtype)
        return self.steering.write(layer, y)

    def _attend(self, owner: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """query: [rows, heads, positions, width] -> [rows, positions, heads, width]."""
        layer = layer_of_module(self.layer_of, owner)
        dtype = self.baseline.model.dtype
        if self.frozen.has_pattern(layer):
            out = _mix_rows(self.baseline.frozen.layers[layer].attention, value.to(dtype))
        else:
            window = self.windows.window(options["attention_mask"])
            attention = attention_inputs(owner, layer, query, key, options, window, dtype)
            out = attend(attention, value.flatten(0, 1).to(dtype), None).unflatten(0, query.shape[:2]).transpose(1, 2)
        return out.to(query.dtype)


def _mix_rows(attention: Attention, value: Tensor) -> Tensor:
    """Mix values of all rows by one pattern: [rows, kv_heads, positions, width] -> [rows, positions, heads, width]."""
    mixed = mix(attention, value.permute(1, 2, 0, 3).flatten(2))
    by_row: Tensor = mixed.unflatten(2, (len(value), -1))
    return by_row.permute(2, 1, 0, 3)


def _call(layer: nn.Module, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call a layer as the model called it, on another stream."""
    if args:
        out = layer(stream.to(args[0].dtype), *args[1:], **kwargs)
    else:
        out = layer(**{**kwargs, "hidden_states": stream.to(kwargs["hidden_states"].dtype)})
    stream_out: Tensor = out[0] if isinstance(out, tuple) else out
    return stream_out
