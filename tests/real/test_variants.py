"""Interventions on real weights: many variants at once, generation, and the faithfulness of graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pycircuit as pc
from pycircuit.model.agreement import relative_error
from pycircuit.model.attention_choice import use_attention

pytestmark = pytest.mark.usefixtures("one_thread")  # of several, those that wait for each other decide

VARIANTS, LAYER, POSITIONS = 64, 20, 64


def timed(function: Callable[[], Any], times: int = 2) -> tuple[float, Any]:
    """The best time of a few runs, in seconds, and the last result."""
    best, result = float("inf"), None
    for _ in range(times):
        begin = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - begin)
    return best, result


@pytest.mark.parametrize("freeze", ["attention", "none"])
def test_variants_share_the_layers_below_them(
    hf_model: Any,
    at_random: Callable[[int], Any],
    texts: dict[int, list[int]],
    figure: Callable[[str], None],
    freeze: str,
) -> None:
    """64 variants at layer 20 of 30: three times faster than 64 forwards, and the same as one by one."""
    model, ids = pc.ReplacementModel(hf_model, at_random(POSITIONS)), torch.tensor(texts[POSITIONS])
    features = model.activations(ids)[LAYER]
    entries = torch.linspace(0, features.count - 1, VARIANTS).long()
    positions, indices = features.position()[entries].tolist(), features.index[entries].tolist()
    variants = [[pc.Intervention(LAYER, p, f, factor=3)] for p, f in zip(positions, indices, strict=True)]

    def forwards() -> None:
        with torch.no_grad(), use_attention(hf_model, "eager"):
            for _ in variants:
                hf_model(input_ids=ids[None], use_cache=False)

    def many() -> list[pc.Intervened]:
        results = pc.intervene_many(model, ids, variants, freeze=freeze)
        for result in results:
            result.probabilities  # noqa: B018 - computed at first use
        return results

    forward_time, _ = timed(forwards, 1)
    batch_time, results = timed(many)
    single_time, expected = timed(lambda: [pc.intervene(model, ids, v, freeze=freeze) for v in variants[::8]], 1)
    figure(
        f"{VARIANTS} variants, freeze={freeze}: {batch_time:.2f} s, {forward_time / batch_time:.1f}x faster than "
        f"{VARIANTS} forwards ({forward_time:.2f} s), {8 * single_time / batch_time:.1f}x than one by one"
    )
    for single, result in zip(expected, results[::8], strict=True):
        assert relative_error(result.logits, single.logits) < 1e-5
        assert relative_error(result.logits, result.logits_before) > 1e-4
    assert forward_time > 3 * batch_time


def test_generation(
    hf_model: Any, at_random: Callable[[int], Any], texts: dict[int, list[int]], figure: Callable[[str], None]
) -> None:
    """Greedy as transformers generates; steered, every token costs little more."""
    model, ids = pc.ReplacementModel(hf_model, at_random(POSITIONS)), torch.tensor(texts[POSITIONS])
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones(1, POSITIONS, dtype=torch.int64)}
    theirs, expected = timed(lambda: hf_model.generate(ids[None], **options), 1)
    ours, generated = timed(lambda: pc.generate(model, ids, max_new_tokens=16), 1)
    steer = [pc.Intervention(LAYER, None, 7, 2000.0), pc.Intervention(LAYER, slice(POSITIONS, None), 8, factor=9)]
    steered, changed = timed(lambda: pc.generate(model, ids, steer, max_new_tokens=16), 1)
    figure(f"16 tokens after {POSITIONS}: {theirs:.2f} s by transformers, {ours:.2f} s, steered {steered:.2f} s")
    assert generated == expected[0, POSITIONS:].tolist() and changed != generated
    intervened = pc.intervene(model, [*texts[POSITIONS], *changed[:-1]], steer, freeze="none")
    assert intervened.logits[POSITIONS - 1 :].argmax(-1).tolist() == changed


def test_validation(
    hf_model: Any, trained: pc.PerLayerTranscoders, texts: dict[int, list[int]], figure: Callable[[str], None]
) -> None:
    """With everything frozen the model changes by its edges; else as far as transcoders explain: a figure only."""
    model = pc.ReplacementModel(hf_model, trained)
    graph = pc.attribute(model, texts[POSITIONS], max_features=256, max_targets=5, progress=False)
    took, report = timed(lambda: pc.validate(model, graph), 1)
    modes = [(freeze, report.overall(freeze)) for freeze in ("all", "attention", "none")]
    explained = ", ".join(f"{freeze} {a.explained:.3f} (correlation {a.correlation:.3f})" for freeze, a in modes)
    figure(f"validation, {len(report.nodes)} features ablated, in {took:.1f} s: effect explained: {explained}")
    assert report.overall("all").explained > 0.999  # streams in the thousands round small effects
