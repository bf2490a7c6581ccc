"""Interventions: laws that need no second program, the frozen witness, and arguments."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from frozen_hf import HeldModel
from test_trace import EVERY, replacement
from torch import Tensor

import pycircuit as pc
from pycircuit.causal import FREEZE
from pycircuit.model.capture import relative

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = tiny_models.prompt(9)


def active(model: pc.ReplacementModel, count: int, at_least: int = 0) -> list[tuple[int, int, int, float]]:
    """Active features spread over layers and positions: (layer, position, feature, value)."""
    found = [
        (layer, p, i, v)
        for layer, f in enumerate(model.activations([PROMPT])[0])
        if layer >= at_least
        for p, i, v in zip(f.position().tolist(), f.index.tolist(), f.value.tolist(), strict=True)
    ]
    return found[:: max(1, len(found) // count)][:count]


def doubled(model: pc.ReplacementModel, count: int) -> list[pc.Intervention]:
    return [pc.Intervention(layer, p, f, factor=2) for layer, p, f, _ in active(model, count)]


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_the_value_that_a_feature_has_changes_nothing(family: str, kind: str) -> None:
    """Exactly in float64; in float32 to its rounding, which the skips of random transcoders enlarge in every layer."""
    rounding = 1e-4 if "skip" in kind else 1e-5
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, rounding)):
        model = replacement(family, kind, dtype)
        found = active(model, 7)
        same = [pc.Intervention(layer, p, f, value) for layer, p, f, value in found[::2]]
        same += [pc.Intervention(layer, p, f, factor=1) for layer, p, f, _ in found[1::2]]
        with torch.no_grad():
            expected = model.hf_model(input_ids=PROMPT[None]).logits[0]
        for freeze in FREEZE:
            result = model.intervene(PROMPT, same, freeze)
            assert relative(result.logits_before, expected) < 1e-5
            assert relative(result.logits, result.logits_before) < bound
            moved, values = result.effect([f[:3] for f in found]), torch.tensor([f[3] for f in found])
            assert relative(values + moved, values) < bound


class Witness(HeldModel):
    """transformers' own forward with patterns and denominators held, MLPs too where `frozen`."""

    frozen = True

    def _writer(self, at: int) -> Any:
        held = super()._writer(at)

        def act(module: Any, args: Any, out: Any) -> Any:
            if self.added is None or self.frozen:
                return held(module, args, out)
            first = (out[0] if isinstance(out, tuple) else out) + self.added[:, at]
            return (first, *out[1:]) if isinstance(out, tuple) else first

        return act


def written(model: pc.ReplacementModel, layer: int, feature: int) -> Tensor:
    """Decoder rows of one feature: [layers, width], zero where it does not write."""
    out = torch.zeros(model.depth, model.width, dtype=model.dtype)
    row = model.transcoders.w_dec[layer][feature]
    out[layer : layer + (1 if row.ndim == 1 else len(row))] = row
    return out


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_the_witness_is_moved_alike(family: str, kind: str) -> None:
    """One feature a variant, ablated, doubled or set: every read and the logits, MLPs held and running."""
    model = replacement(family, kind, torch.float64)
    transcoders, found = model.transcoders, active(model, 6)
    new = [value * (0, 2, -1.5)[i % 3] for i, (*_, value) in enumerate(found)]
    variants = [[pc.Intervention(*f[:3], v)] for f, v in zip(found, new, strict=True)]
    witness = Witness(model.hf_model, PROMPT, transcoders.reads, transcoders.writes, transcoders.w_skip)
    added = torch.zeros(len(found), model.depth, len(PROMPT), model.width, dtype=model.dtype)
    for run, (layer, p, feature, value) in enumerate(found):
        added[run, :, p] = (new[run] - value) * written(model, layer, feature)
    for freeze in ("all", "attention"):
        witness.frozen = freeze == "all"
        read, logits = witness.run(added, torch.zeros(len(found), len(PROMPT)))
        results = model.intervene_many(PROMPT, variants, freeze)
        for run, result in enumerate(results):
            ours = torch.stack([result.after.reads(layer) for layer in range(model.depth)])
            assert relative(ours, read[:, run]) < 1e-9
            assert relative(result.logits, capped(model, logits[run])) < 1e-9
            assert relative(result.logits, result.logits_before) > 1e-4


def capped(model: pc.ReplacementModel, logits: Tensor) -> Tensor:
    cap = model.weights.final_softcap
    return cap * torch.tanh(logits / cap) if cap else logits
