"""The laws on real weights (`make test-real`): SmolLM2-135M-Instruct, dequantised."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deviation import worst_deviation
from training import LAYERS, Streams, explained

import pycircuit as pc
from pycircuit.model.agreement import relative_error
from pycircuit.model.capture import STREAMS, capture

DALLAS = "The city of Dallas is in the state of"
ANSWERS = {  # prompt -> the likeliest next token and its probability
    DALLAS: (" Texas", 0.87),
    "When Mary and John went to the store, John gave a drink to": (" Mary", 0.92),
    "The National Digital Analytics Group (N": ("DA", 0.89),
    "The Eiffel Tower is located in the city of": (" Paris", 0.70),
    "The chemical symbol for gold is": (" Au", 0.96),
    "hot - cold, big - small, fast -": (" slow", 0.71),
}

Figure = Callable[[str], None]


@pytest.fixture(scope="module")
def model(hf_model: Any, trained: pc.PerLayerTranscoders, tokenizer: Any) -> pc.ReplacementModel:
    return pc.ReplacementModel(hf_model, trained, tokenizer)


def eager_logits(hf_model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the transformers model: [positions, vocabulary]."""
    with torch.no_grad():
        return hf_model(ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize("positions", [64, 512])
def test_logits_and_streams_equal_the_models(
    model: pc.ReplacementModel, texts: dict[int, list[int]], positions: int, figure: Figure
) -> None:
    """Frozen, the model is itself: its logits, and its last stream from embeddings, attention and MLP outputs alone."""
    ids = torch.tensor(texts[positions])
    captured = capture(model.hf_model, model.family, model.weights, ids, STREAMS, stored=positions == 64)
    logit_error = relative_error(captured.model.logits(), eager_logits(model.hf_model, ids))
    *_, (last, _, _) = captured.model.streams(captured.streams["mlp_raw"])
    stream_error = relative_error(last, captured.model.final_stream)
    figure(f"P {positions}: logits {logit_error:.1e}, last stream {stream_error:.1e} off (of the largest)")
    assert logit_error < 1e-4 and stream_error < 1e-5


def test_transformers_4_and_5_find_the_rotary_base_and_a_tokenizer_they_have(folder: Path) -> None:
    config, tokenizer = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "tokenizer_config"))
    assert config.get("rope_theta") == config.get("rope_parameters", {}).get("rope_theta") == 1e5
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and not tokenizer.get("add_bos_token")


@pytest.mark.parametrize("prompt", ANSWERS)
def test_answers(model: pc.ReplacementModel, prompt: str) -> None:
    answer, probability = ANSWERS[prompt]
    share, token = model.freeze(prompt).model.logits()[-1].softmax(-1).max(0)
    assert model.tokenizer.decode([int(token)]) == answer
    assert float(share) == pytest.approx(probability, abs=0.006)


@pytest.mark.parametrize("positions", [64, 512])
def test_law_with_random_transcoders(
    hf_model: Any, at_random: Callable[[int], Any], texts: dict[int, list[int]], positions: int, figure: Figure
) -> None:
    graph = law(pc.ReplacementModel(hf_model, at_random(positions)), texts[positions], "random", figure)
    assert len(graph.features) == pytest.approx(LAYERS * 32 * (positions - 1), rel=0.01)


@pytest.mark.parametrize("positions", [64, 512])
def test_law_with_trained_transcoders(
    model: pc.ReplacementModel, texts: dict[int, list[int]], positions: int, figure: Figure
) -> None:
    graph = law(model, texts[positions], "trained", figure)
    replacement, completeness = graph.scores()
    figure(f"trained, P {positions}: replacement {replacement:.2f}, completeness {completeness:.2f}")


def law(model: pc.ReplacementModel, ids: list[int], name: str, figure: Figure) -> pc.Graph:
    begin = time.perf_counter()
    graph = pc.attribute(model, ids, max_features=64, max_targets=5, progress=False)
    took = time.perf_counter() - begin
    rows = f"{len(graph.features)} features, {graph.rows.count} rows"
    figure(f"{name}, P {len(ids)}: certificate {graph.certificate:.1e}, {rows}, {took:.1f} s")
    assert graph.rows.count == 64 + len(graph.targets)
    assert graph.certificate < 1e-5
    return graph


def test_training_explains_more_than_the_mean_and_than_chance(
    trained: pc.PerLayerTranscoders,
    at_random: Callable[[int], pc.PerLayerTranscoders],
    streams: tuple[Streams, Streams],
    figure: Figure,
) -> None:
    """On text that was not trained on, in every layer."""
    learned, chance = explained(trained, streams[1]), explained(at_random(64), streams[1])
    figure(f"explained variance: median {float(learned.median()):.2f}, by layer {_short(learned)}")
    figure(f"random transcoders: median {float(chance.median()):.2f}, at best {float(chance.max()):.2f}")
    assert bool((learned > 0).all()) and bool((learned > chance).all())


def _short(values: torch.Tensor) -> str:
    return " ".join(f"{v:.2f}" for v in values.tolist())


def test_targets_by_text(model: pc.ReplacementModel) -> None:
    """The tokenizer comes out of the GGUF: text in, text out."""
    graph = pc.attribute(model, DALLAS, max_features=0, progress=False)
    assert graph.targets.labels[0] == " Texas" and graph.prompt == DALLAS
    assert float(graph.targets.weights[0]) == pytest.approx(0.87, abs=0.006)
    named = pc.attribute(model, DALLAS, targets=[" Texas", " Oklahoma"], max_features=0, progress=False)
    assert list(named.targets.labels) == [" Texas", " Oklahoma"]
    assert torch.equal(named.targets.ids[:1], graph.targets.ids[:1])
    assert max(graph.certificate, named.certificate) < 1e-5


@pytest.fixture(scope="module")
def double(load: Callable[[torch.dtype], Any], trained: pc.PerLayerTranscoders, tokenizer: Any) -> pc.ReplacementModel:
    return pc.ReplacementModel(load(torch.float64), trained.to(torch.float64), tokenizer)


def test_doubled_sources_change_targets_by_their_edges(double: pc.ReplacementModel, figure: Figure) -> None:
    """Doubling sources in the real model, in float64: the strongest features, some errors, every token."""
    graph = pc.attribute(double, DALLAS, max_features=24, max_targets=3, progress=False)
    features = graph.influence()[: len(graph.features)].topk(16).indices.tolist()
    errors = [graph.error_node(layer, p) for layer in (0, 14, 29) for p in (0, 3, graph.positions - 1)]
    nodes = features + errors + list(range(graph.first_token, graph.first_target))
    begin = time.perf_counter()
    preactivation_error, edge_error = worst_deviation(graph, double, nodes)
    took = time.perf_counter() - begin
    figure(
        f"interventions: {len(nodes)} sources x {graph.rows.count} rows, {edge_error:.1e} of a row's norm, {took:.0f} s"
    )
    assert max(preactivation_error, edge_error) < 1e-10 and graph.certificate < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(
    load: Callable[[torch.dtype], Any],
    trained: pc.PerLayerTranscoders,
    tokenizer: Any,
    dtype: torch.dtype,
    figure: Figure,
) -> None:
    """The law holds to float32: patterns and MLP outputs are the half-precision run's, the rest is added up again.

    Logits differ from the model's by its own rounding: every layer rounds the stream, thirty times over.
    """
    model = pc.ReplacementModel(load(dtype), trained, tokenizer)
    graph = pc.attribute(model, DALLAS, max_features=64, max_targets=5, progress=False)
    ids = model.tokens(DALLAS)
    theirs = eager_logits(model.hf_model, ids)[-1].float()
    ours = model.freeze(ids).model.logits()[-1].float()
    error = relative_error(ours, theirs)
    share = [float(x.softmax(-1).max()) for x in (ours, theirs)]
    figure(
        f"{dtype}: certificate {graph.certificate:.1e}, logits {error:.1e} off, p {share[0]:.3f} against {share[1]:.3f}"
    )
    assert model.dtype == torch.float32 and graph.certificate < 1e-5
    assert graph.targets.labels[0] == " Texas" and int(theirs.argmax()) == int(graph.targets.ids[0])
    assert error < {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
