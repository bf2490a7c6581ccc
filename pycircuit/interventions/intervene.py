"""Interventions on one prompt: one set of them, or many as a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from pycircuit.graph.show.html_table import html_table
from pycircuit.model.prompts import Prompt
from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import SparseFeatures, checks
from pycircuit.ops.torch_settings import full_float32, without_autocast
from pycircuit.trace import Feature

from .intervention import Freeze, Frozen, Intervention, checked_interventions, checked_positions, require_feature
from .intervention_run import BATCH_POSITIONS, BaselineRun, InterventionRun, State, run_baseline
from .notes import Positioned, notes_after, notes_before
from .steering import Steering, activations_at, changes_by_layer

T = TypeVar("T")
_SHOWN_TOKENS = 10  # in a notebook
FeatureIndex = tuple[int, int, int]  # layer, position, feature


@dataclass(frozen=True, eq=False)
class Intervened:
    """A prompt before and after interventions.

    Logits and features are computed at first use.

    Features are what the encoders read: an intervened feature keeps the activation that its own input gives it.

    notes: sentences on interventions that do less than they seem to: a feature that is inactive where it is scaled or
    ablated, a slice past the end of the prompt, a feature that is changed twice. Empty if all act as they are written.
    """

    interventions: tuple[Intervention, ...]
    freeze: Freeze
    layers: range | None
    before: State
    after: State
    notes: tuple[str, ...] = ()

    @property
    def logits(self) -> Tensor:
        """Logits, softcap included: [positions, vocabulary]."""
        return self.after.logits

    @property
    def logits_before(self) -> Tensor:
        """Logits without the interventions, shared by variants of a prompt: [positions, vocabulary]."""
        return self.before.logits

    @property
    def probabilities(self) -> Tensor:
        """Probabilities of the token after the last: [vocabulary]."""
        return self.after.probabilities()

    @property
    def probabilities_before(self) -> Tensor:
        """Probabilities of the token after the last without the interventions: [vocabulary]."""
        return self.before.probabilities()

    @property
    def features(self) -> tuple[SparseFeatures, ...]:
        """Active features, one entry a layer."""
        return self.after.features

    @property
    def features_before(self) -> tuple[SparseFeatures, ...]:
        """Active features without the interventions, one entry a layer."""
        return self.before.features

    def effect(
        self, features: Sequence[Feature | FeatureIndex] | Tensor | np.ndarray, preactivation: bool = False
    ) -> Tensor:
        """The change of each feature's activation: [n].

        features: (layer, position, feature) or pc.Feature of each, or a tensor such as rows of graph.features.
        preactivation: the change of the encoder's output before its activation function.
        """
        wanted = self._checked(features)
        out = self.after.final.new_zeros(len(wanted))
        for layer in {layer for layer, _, _ in wanted}:
            entries = [i for i, (own_layer, _, _) in enumerate(wanted) if own_layer == layer]
            position = torch.tensor([wanted[i][1] for i in entries], device=out.device)
            index = torch.tensor([wanted[i][2] for i in entries], device=out.device)
            reads = [state.reads(layer)[position] for state in (self.after, self.before)]
            out[entries] = self._change(layer, reads, index, preactivation)
        return out

    def _change(self, layer: int, reads: list[Tensor], index: Tensor, preactivation: bool) -> Tensor:
        transcoders = self.after.model.transcoders
        if preactivation:
            products: Tensor = (reads[0] - reads[1]) * transcoders.w_enc[layer][index].to(reads[0].dtype)
            return products.sum(1)
        row, size = torch.arange(len(index), device=index.device), transcoders.size(layer)
        after, before = (activations_at(transcoders.encode(layer, x), row, index, size) for x in reads)
        return after - before

    def _checked(self, features: Sequence[Feature | FeatureIndex] | Tensor | np.ndarray) -> list[FeatureIndex]:
        op, model, count = "effect", self.after.model, len(self.after.final)
        result = []
        entries: Any = features if isinstance(features, Sequence) else features.tolist()
        for entry in entries:
            if isinstance(entry, Feature):
                entry = (entry.layer, entry.position, entry.feature)
            if not isinstance(entry, Sequence) or len(entry) != 3:
                raise TypeError(f"{op}: features must be (layer, position, feature) each, got {entry!r}")
            layer = checks.whole_number(op, "layer", entry[0], 0)
            feature = checks.whole_number(op, "feature", entry[2], 0)
            position = checks.whole_number(op, "position", entry[1], -count)
            if position >= count or position % count < model.ignore_positions:
                raise ValueError(f"{op}: position must be from {model.ignore_positions} to {count - 1}, got {position}")
            require_feature(op, model, layer, feature)
            result.append((layer, position % count, feature))
        return result

    def _repr_html_(self) -> str:
        before, after = self.probabilities_before, self.probabilities
        tokens = torch.maximum(before, after).topk(min(_SHOWN_TOKENS, len(after))).indices
        ordered = tokens[after[tokens].argsort(descending=True, stable=True)].tolist()
        tokenizer = self.after.model.tokenizer
        names = [str(token) if tokenizer is None else repr(str(tokenizer.decode([token]))) for token in ordered]
        rows = [
            (name, f"{100 * float(before[token]):.2f}%", f"{100 * float(after[token]):.2f}%")
            for name, token in zip(names, ordered, strict=True)
        ]
        return html_table(("next token", "before", "after"), rows, repr(self))

    def __repr__(self) -> str:
        interventions = f"{len(self.interventions)} interventions, freeze={self.freeze!r}, layers={self.layers}"
        notes = f", notes={list(self.notes)}" if self.notes else ""
        return f"Intervened({interventions}, positions={len(self.after.final)}{notes})"


def intervene(
    model: ReplacementModel,
    prompt: Prompt,
    interventions: Sequence[Intervention],
    *,
    freeze: Freeze = "attention",
    layers: range | None = None,
) -> Intervened:
    """Run the prompt with features set, scaled or ablated: logits and features before and after, and effects.

    A changed feature adds (new activation - present one) * its decoder row to the output of every MLP it writes
    to. freeze says what keeps the value it had on the prompt: "attention", attention patterns and norm
    denominators; "patterns", attention patterns; "all", these and every MLP's output, the changes apart, so that
    the model is linear; "none", nothing. layers: MLPs of this range are frozen and changes written there alone;
    with freeze="none" patterns and denominators are frozen there too, and beyond it everything recomputes.
    """
    checked = checked_interventions("intervene", "interventions", interventions, model)
    return _run("intervene", model, prompt, [checked], freeze, layers, _unchanged)[0]


@overload
def intervene_many(
    model: ReplacementModel,
    prompt: Prompt,
    variants: Sequence[Sequence[Intervention]],
    *,
    freeze: Freeze = "attention",
    layers: range | None = None,
    summarize: None = None,
) -> list[Intervened]: ...
@overload
def intervene_many(
    model: ReplacementModel,
    prompt: Prompt,
    variants: Sequence[Sequence[Intervention]],
    *,
    freeze: Freeze = "attention",
    layers: range | None = None,
    summarize: Callable[[Intervened], T],
) -> list[T]: ...
def intervene_many(
    model: ReplacementModel,
    prompt: Prompt,
    variants: Sequence[Sequence[Intervention]],
    *,
    freeze: Freeze = "attention",
    layers: range | None = None,
    summarize: Callable[[Intervened], T] | None = None,
) -> list[Intervened] | list[T]:
    """`intervene` for each of several lists of interventions, run together, in batches.

    The prompt itself runs once, and of the variants only what is not below the batch's first intervened layer.
    summarize: called with every result as soon as it exists; its result takes the place of the Intervened, so that
    thousands of variants need the memory of one batch.
    """
    op = "intervene_many"
    if not isinstance(variants, Sequence):
        raise TypeError(f"{op}: variants must be a list of lists of pc.Intervention, got {type(variants).__name__}")
    if summarize is not None and not callable(summarize):
        raise TypeError(f"{op}: summarize must be a function of a pc.Intervened, got {type(summarize).__name__}")
    checked = [
        checked_interventions(op, f"variants[{i}]", interventions, model) for i, interventions in enumerate(variants)
    ]
    if not checked:
        raise ValueError(f"{op}: variants must have at least one entry, got none")
    if summarize is None:
        return _run(op, model, prompt, checked, freeze, layers, _unchanged)
    return _run(op, model, prompt, checked, freeze, layers, summarize)


def _unchanged(result: Intervened) -> Intervened:
    return result


@without_autocast()
@full_float32()
def _run(
    op: str,
    model: ReplacementModel,
    prompt: Prompt,
    variants: list[tuple[Intervention, ...]],
    freeze: Freeze,
    layers: range | None,
    summarize: Callable[[Intervened], T],
) -> list[T]:
    frozen = Frozen.checked(op, freeze, layers, model.depth)
    ids = model.tokens(prompt)
    positioned = [_positioned(op, model, interventions, len(ids), frozen) for interventions in variants]
    with model.forward_lock:
        baseline = run_baseline(model, ids, patterns=frozen.freeze != "none" or layers is not None)
    order = sorted(range(len(variants)), key=lambda i: _first_layer(variants[i]))  # variants that begin alike together
    step = max(1, BATCH_POSITIONS // len(ids))
    results: dict[int, T] = {}
    for begin in range(0, len(order), step):
        batch = order[begin : begin + step]
        with model.forward_lock:
            states, steering = _run_batch(baseline, [positioned[i] for i in batch], frozen)
        _check_finite(op, states)
        unchanged: dict[int, set[tuple[int, int, int]]] = {}
        for row, *key in steering.unchanged():
            unchanged.setdefault(row, set()).add((key[0], key[1], key[2]))
        for row, (i, state) in enumerate(zip(batch, states, strict=True)):
            notes = notes_before(positioned[i], len(ids)) + notes_after(positioned[i], unchanged.get(row, set()))
            results[i] = summarize(Intervened(variants[i], frozen.freeze, layers, baseline.state, state, tuple(notes)))
    return [results[i] for i in range(len(variants))]


def _check_finite(op: str, states: Sequence[State]) -> None:
    """Raise if a variant overflowed: the square of its stream, which norms and logits need, is infinite or NaN."""
    streams = [t for state in states for t in (state.final, state.transcoder_inputs) if t.numel()]
    largest = float(torch.stack([torch.stack(t.aminmax()) for t in streams]).abs().max())
    limit = torch.finfo(streams[0].dtype).max ** 0.5
    if not largest <= limit:
        dtype = str(streams[0].dtype).removeprefix("torch.")
        raise ValueError(
            f"{op}: interventions must leave the stream below {limit:.1e}, whose square {dtype} can hold, got "
            f"{largest:.1e}; lower value or factor"
        )


def _positioned(
    op: str, model: ReplacementModel, interventions: Sequence[Intervention], positions: int, frozen: Frozen
) -> list[tuple[Intervention, range]]:
    """Interventions with their positions, once all are known to be possible."""
    if not interventions:
        raise ValueError(f"{op}: interventions must have at least one entry, got none")
    for intervention in interventions:
        reached = [layer for layer in frozen.written if intervention.layer in model.transcoders.sources(layer)]
        if not reached:
            raise ValueError(
                f"{op}: layers must hold one that the feature of layer {intervention.layer} writes to, got "
                f"{frozen.layers}"
            )
    ignore = model.ignore_positions
    return [
        (intervention, checked_positions(op, intervention, positions, positions, ignore))
        for intervention in interventions
    ]


def _first_layer(interventions: Sequence[Intervention]) -> int:
    return min(intervention.layer for intervention in interventions)


def _run_batch(baseline: BaselineRun, variants: Sequence[Positioned], frozen: Frozen) -> tuple[list[State], Steering]:
    """Run variants together and return (a state of each, the steering with its differences)."""
    placed = [
        (row, position, intervention)
        for row, variant in enumerate(variants)
        for intervention, positions in variant
        for position in positions
    ]
    changes = changes_by_layer(placed, baseline.state.final)
    steering = Steering(baseline.model.transcoders, changes, baseline.original, frozen.layers, frozen.written)
    return InterventionRun(baseline, steering, frozen, len(variants), min(changes)).run(), steering
