"""circuit-tracer 0.5.0 on the same weights: interventions, frozen and free, and steered generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pair
import pytest
import torch
from torch import Tensor

import pycircuit as pc

SIZE = pair.Size()
SIZES = {"llama": SIZE, "gemma2": SIZE, "gpt2": replace(SIZE, kv_heads=SIZE.heads)}
KINDS = {
    "plt_jumprelu": pair.Kind(),
    "plt_topk_skip": pair.Kind(rule="topk", skip=True),
    "plt_raw": pair.Kind(reads="mlp_normed", writes="mlp_raw"),
    "clt_jumprelu": pair.Kind(cross=True, reads="resid_mid"),
    "clt_relu_skip": pair.Kind(cross=True, reads="resid_mid", rule="relu", skip=True),
}
# ours -> theirs. What they call frozen attention are the patterns; denominators they hold with every layer alone.
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"freeze": "none"}, {"freeze_attention": False}),
    "patterns": ({"freeze": "patterns"}, {"freeze_attention": True}),
    "all": ({"freeze": "all"}, {"constrained_layers": range(SIZE.layers)}),
    "range": ({"freeze": "patterns", "layers": range(1, 2)}, {"constrained_layers": range(1, 2)}),
    "first": ({"freeze": "patterns", "layers": range(2)}, {"constrained_layers": range(2)}),
}
ACTIVE, POSITIONS, CLOSE = 6, 13, 1e-4
CASES = [(family, kind) for family in pair.CONFIGS for kind in KINDS]


@cache
def models(family: str, kind: str) -> tuple[Any, Any]:
    arguments = (family, KINDS[kind], SIZES[family], torch.float32, ACTIVE)
    return pair.our_model(*arguments), pair.circuit_tracer_model(*arguments)


def ids() -> Tensor:
    return pair.prompt(POSITIONS, SIZE.vocabulary)


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def chosen(model: pc.ReplacementModel, layers: range) -> list[pc.Intervention]:
    """Ablated, enlarged, reversed, and set where silent: several in a layer, at one position and at many."""
    result: list[pc.Intervention] = []
    for layer, features in enumerate(model.activations([ids()])[0]):
        if layer in layers:
            places = list(
                zip(features.position().tolist(), features.index.tolist(), features.value.tolist(), strict=True)
            )
            for i, (p, f, value) in enumerate(places[3 :: len(places) // 4][:4]):
                result.append(pc.Intervention(layer, p, f, (0.0, 3 * value, -value, 2.0)[i]))
            result += [
                pc.Intervention(layer, slice(4, None), 5 + layer, 1.5),
                pc.Intervention(layer, slice(2, 9), 3, 0),
            ]
    return result


def as_tuples(interventions: list[pc.Intervention]) -> list[tuple[Any, ...]]:
    return [(item.layer, item.position, item.feature, item.value) for item in interventions]


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Hooks of an intervention are circuit-tracer's own to remove."""
    try:
        yield
    finally:
        model.reset_hooks()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_same_logits_and_activations(family: str, kind: str, mode: str) -> None:
    ours, theirs = models(family, kind)
    our_way, their_way = MODES[mode]
    layers = {"range": range(2) if KINDS[kind].cross else range(1, 2), "first": range(2)}.get(mode, range(SIZE.layers))
    steer = chosen(ours, layers)
    with quiet(theirs):
        logits, activations = theirs.feature_intervention(ids(), as_tuples(steer), **their_way)
    result = pc.intervene(ours, ids(), steer, **our_way)
    assert off(result.logits, logits[0]) < CLOSE
    results = torch.stack([f.dense(SIZE.features) for f in result.features])
    if KINDS[kind].rule == "topk":  # which features are among the largest may turn on the last bit
        far = (results - activations).abs() > CLOSE * activations.abs().max()
        assert float(far.double().mean()) < 1e-3
    else:
        assert off(results, activations) < CLOSE
    assert off(result.logits, result.logits_before) > 1e-2


@pytest.mark.parametrize("mode", ["all", "patterns"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_same_change_of_preactivations(family: str, kind: str, mode: str) -> None:
    """One feature doubled: what every other reads before its activation function."""
    ours, theirs = models(family, kind)
    our_way, their_way = MODES[mode]
    item = chosen(ours, range(1))[1]
    options = {"apply_activation_function": False, **their_way}
    with quiet(theirs):
        _, after = theirs.feature_intervention(ids(), as_tuples([item]), **options)
        before = theirs.get_activations(ids(), apply_activation_function=False)[1]
    wanted = [(layer, p, f) for layer in range(SIZE.layers) for p in range(1, POSITIONS) for f in range(SIZE.features)]
    moved = pc.intervene(ours, ids(), [item], **our_way).effect(wanted, preactivation=True)
    assert off(moved, (after - before)[:, 1:].flatten()) < CLOSE


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_same_steered_text_and_logits(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, eight tokens, open-ended steering going on over them."""
    ours, theirs = models(family, kind)
    inner = theirs.generate  # takes a batch of prompts only, what is around it one prompt only
    monkeypatch.setattr(theirs, "generate", lambda ids, **options: inner(ids[None], **options))
    steer, count = chosen(ours, range(SIZE.layers)), 8
    with quiet(theirs):
        _, logits, _ = theirs.feature_intervention_generate(
            ids(), as_tuples(steer), freeze_attention=False, max_new_tokens=count, do_sample=False, stop_at_eos=False,
            verbose=False,
        )  # fmt: skip
    ours.hf_model.generation_config.eos_token_id = None
    results = pc.generate(ours, ids(), steer, max_new_tokens=count)
    assert logits.argmax(-1).tolist() == results
    result = pc.intervene(ours, [*ids().tolist(), *results[:-1]], steer, freeze="none")
    assert off(result.logits[POSITIONS - 1 :], logits) < CLOSE
