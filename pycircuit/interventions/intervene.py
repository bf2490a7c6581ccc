"""Interventions on one prompt: one set of them, or many as a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import SparseFeatures, checks
from pycircuit.ops.torch_settings import full_float32, without_autocast
from pycircuit.trace import Feature

from .intervention import Hold, Intervention, feature_of, interventions_of, positions_of
from .intervention_run import BATCH_POSITIONS, Changed, Plain, State, plain
from .steering import Steering, activations_at, earliest, entries_of

Prompt = str | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Intervened:
    """What interventions did on a prompt. Logits and features are worked out when they are first asked for.

    Features are what the encoders read: an intervened feature keeps the activation that its own input gives it.
    """

    interventions: tuple[Intervention, ...]
    freeze: str
    layers: range | None
    before: State
    after: State

    @property
    def logits(self) -> Tensor:
        """[positions, vocabulary], softcap included."""
        return self.after.logits

    @property
    def logits_before(self) -> Tensor:
        """[positions, vocabulary] without the interventions; variants of a prompt share them."""
        return self.before.logits

    @property
    def probabilities(self) -> Tensor:
        """Of the token after the last: [vocabulary]."""
        return self.after.probabilities()

    @property
    def probabilities_before(self) -> Tensor:
        return self.before.probabilities()

    @property
    def features(self) -> tuple[SparseFeatures, ...]:
        """Active features, one entry a layer."""
        return self.after.features

    @property
    def features_before(self) -> tuple[SparseFeatures, ...]:
        return self.before.features

    def effect(self, features: Any, preactivation: bool = False) -> Tensor:
        """How much each feature's activation changed: [n].

        features: (layer, position, feature) or pc.Feature of each, or a tensor such as rows of graph.features.
        preactivation: the change of what the encoder gives before its activation function.
        """
        wanted = self._checked(features)
        out = self.after.final.new_zeros(len(wanted))
        for layer in {one[0] for one in wanted}:
            at = [i for i, one in enumerate(wanted) if one[0] == layer]
            position, index = (torch.tensor([wanted[i][part] for i in at], device=out.device) for part in (1, 2))
            reads = [state.reads(layer)[position] for state in (self.after, self.before)]
            out[at] = self._moved(layer, reads, index, preactivation)
        return out

    def _moved(self, layer: int, reads: list[Tensor], index: Tensor, preactivation: bool) -> Tensor:
        transcoders = self.after.model.transcoders
        if preactivation:
            return ((reads[0] - reads[1]) * transcoders.w_enc[layer][index].to(reads[0].dtype)).sum(1)
        row, size = torch.arange(len(index), device=index.device), transcoders.size(layer)
        after, before = (activations_at(transcoders.encode(layer, x), row, index, size) for x in reads)
        return after - before

    def _checked(self, features: Any) -> list[tuple[int, int, int]]:
        op, model, count = "effect", self.after.model, len(self.after.final)
        found = []
        for one in features.tolist() if hasattr(features, "tolist") else features:
            if isinstance(one, Feature):
                one = (one.layer, one.position, one.feature)
            if not isinstance(one, Sequence) or len(one) != 3:
                raise TypeError(f"{op}: features must be (layer, position, feature) each, got {one!r}")
            layer, feature = (checks.whole_number(op, name, one[i], 0) for name, i in (("layer", 0), ("feature", 2)))
            position = checks.whole_number(op, "position", one[1], -count)
            if position >= count or position % count < model.ignore_positions:
                raise ValueError(f"{op}: position must be from {model.ignore_positions} to {count - 1}, got {position}")
            feature_of(op, model, layer, feature)
            found.append((layer, position % count, feature))
        return found

    def __repr__(self) -> str:
        what = f"{len(self.interventions)} interventions, freeze={self.freeze!r}, layers={self.layers}"
        return f"Intervened({what}, positions={len(self.after.final)})"


def intervene(
    model: ReplacementModel,
    prompt: Prompt,
    interventions: Sequence[Intervention],
    freeze: str = "attention",
    layers: range | None = None,
) -> Intervened:
    """Run the prompt with features set, scaled or ablated: logits and features before and after, and effects.

    A changed feature adds (new activation - present one) * its decoder row to the output of every MLP it writes
    to. freeze says what keeps the value it had on the prompt: "attention", attention patterns and norm
    denominators; "patterns", attention patterns; "all", these and every MLP's output, the changes apart, so that
    the model is linear; "none", nothing. layers: MLPs of this range are held and changes written there alone;
    with freeze="none" patterns and denominators are held there too, and beyond it everything recomputes.
    """
    found = interventions_of("intervene", "interventions", interventions, model)
    result: Intervened = _run("intervene", model, prompt, [found], freeze, layers, None)[0]
    return result


def intervene_many(
    model: ReplacementModel,
    prompt: Prompt,
    variants: Sequence[Sequence[Intervention]],
    freeze: str = "attention",
    layers: range | None = None,
    each: Callable[[Intervened], Any] | None = None,
) -> list[Any]:
    """`intervene` for each of several lists of interventions, run together, in batches.

    The prompt itself runs once, and of the variants only what is not below the batch's first intervened layer.
    each: called with every result as soon as it is there; what it returns is kept in the result's place, so that
    thousands of variants need the memory of one batch.
    """
    op = "intervene_many"
    if not isinstance(variants, Sequence):
        raise TypeError(f"{op}: variants must be a list of lists of pc.Intervention, got {type(variants).__name__}")
    if each is not None and not callable(each):
        raise TypeError(f"{op}: each must be a function of a pc.Intervened, got {type(each).__name__}")
    found = [interventions_of(op, f"variants[{i}]", one, model) for i, one in enumerate(variants)]
    if not found:
        raise ValueError(f"{op}: variants must have at least one entry, got none")
    return _run(op, model, prompt, found, freeze, layers, each)


@without_autocast()
@full_float32()
def _run(
    op: str,
    model: ReplacementModel,
    prompt: Prompt,
    variants: list[tuple[Intervention, ...]],
    freeze: str,
    layers: range | None,
    each: Callable[[Intervened], Any] | None,
) -> list[Any]:
    hold = Hold.of(op, freeze, layers, model.depth)
    ids = model.tokens(prompt)
    where = [_where(op, model, one, len(ids), hold) for one in variants]
    with model.running:
        start = plain(model, ids, patterns=hold.freeze != "none" or layers is not None)
    order = sorted(range(len(variants)), key=lambda i: earliest(variants[i]))  # those that begin alike run together
    step, results = max(1, BATCH_POSITIONS // len(ids)), [None] * len(variants)  # type: tuple[int, list[Any]]
    for begin in range(0, len(order), step):
        batch = order[begin : begin + step]
        with model.running:
            states = _batch(start, [where[i] for i in batch], hold)
        for at, state in zip(batch, states, strict=True):
            result = Intervened(variants[at], hold.freeze, layers, start.state, state)
            results[at] = result if each is None else each(result)
    return results


Where = list[tuple[Intervention, range]]


def _where(op: str, model: ReplacementModel, given: Sequence[Intervention], positions: int, hold: Hold) -> Where:
    """At which positions each intervention acts, once all are known to be possible."""
    if not given:
        raise ValueError(f"{op}: interventions must have at least one entry, got none")
    for one in given:
        reached = [at for at in hold.written if one.layer in model.transcoders.sources(at)]
        if not reached:
            raise ValueError(
                f"{op}: layers must hold one that the feature of layer {one.layer} writes to, got {hold.layers}"
            )
    return [(one, positions_of(op, one, positions, positions, model.ignore_positions)) for one in given]


def _batch(start: Plain, variants: list[Where], hold: Hold) -> list[State]:
    """Variants run together."""
    model, state = start.model, start.state
    places = [
        (row, position, one) for row, where in enumerate(variants) for one, positions in where for position in positions
    ]

    entries = entries_of(places, state.final)
    steering = Steering(model.transcoders, entries, start.original, hold.layers, hold.written)
    return Changed(start, steering, hold, len(variants), min(entries)).run()
