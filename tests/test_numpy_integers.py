"""NumPy's integers count as integers in prompts, positions and counts; a bool does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import builders
import numpy as np
import pytest
import torch
from builders import replacement

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")

INTEGERS = pytest.mark.parametrize("number", [np.int64, np.uint8])
TOKENS = builders.prompt(7).tolist()


@pytest.fixture(scope="module")
def model() -> pc.ReplacementModel:
    return replacement("llama", "plt", torch.float32)


@INTEGERS
def test_prompts(model: pc.ReplacementModel, number: Any) -> None:
    """A list of ids, a tuple, an array, and lists of them."""
    prompt = [number(t) for t in TOKENS]
    for form in (prompt, tuple(prompt), np.array(TOKENS, dtype=number), [prompt]):
        assert model.tokens(form).tolist() == TOKENS
    graph = pc.attribute(model, prompt, max_features=2, progress=False)
    assert graph.tokens.ids.tolist() == TOKENS
    assert pc.estimate(model, prompt).positions == len(TOKENS)
    expected = pc.generate(model, TOKENS, max_new_tokens=2)
    assert pc.generate(model, prompt, max_new_tokens=2) == expected
    assert pc.generate(model, np.array(TOKENS, dtype=number), max_new_tokens=2) == expected
    assert pc.generate(model, [prompt], max_new_tokens=2) == [expected]
    (many,) = pc.attribute_many(model, [prompt], workers=number(1), max_features=2, progress=False)
    assert many.tokens.ids.tolist() == TOKENS


@INTEGERS
def test_counts_positions_and_targets(model: pc.ReplacementModel, number: Any, tmp_path: Any) -> None:
    """A graph as with ints, its settings and its checkpoint as JSON."""
    numbers = {"max_features": 4, "max_targets": 3, "round_size": 2}
    reference = pc.attribute(model, TOKENS, position=[2, 6], progress=False, **numbers)
    settings: Any = {name: number(value) for name, value in numbers.items()}
    for position in ([number(2), number(6)], np.array([2, 6], dtype=number)):
        graph = pc.attribute(model, TOKENS, position=position, progress=False, **settings)
        assert torch.equal(graph.rows.weight, reference.rows.weight)
    assert json.loads(json.dumps(graph.provenance))["settings"] == reference.provenance["settings"]
    layer, position, index = graph.features[0].tolist()
    feature = pc.Feature(number(layer), number(position), number(index))
    targets = [number(7), feature]
    options: Any = {"max_features": number(2), "memory": np.int64(1 << 30), "progress": False}
    graph = pc.attribute(model, TOKENS, targets=targets, checkpoint=tmp_path / "rows", **options)
    graph.save(tmp_path / "graph.safetensors")
    expected = pc.attribute(
        model, TOKENS, targets=[7, pc.Feature(layer, position, index)], max_features=2, progress=False
    )
    assert torch.equal(graph.rows.weight, expected.rows.weight)
    counts = {name: settings[name] for name in ("max_features", "max_targets")}
    assert pc.estimate(model, TOKENS, **counts).rows == 7


@INTEGERS
def test_interventions(model: pc.ReplacementModel, number: Any) -> None:
    change = pc.Intervention(number(0), number(3), number(5), 2.0)
    assert change == pc.Intervention(0, 3, 5, 2.0)
    prompt = [number(t) for t in TOKENS]
    result, expected = pc.intervene(model, prompt, [change]), pc.intervene(model, TOKENS, [change])
    assert torch.equal(result.logits, expected.logits)
    rows = np.array([[1, 4, 2], [2, 5, 3]], dtype=number)
    for features in (rows, [tuple(row) for row in rows], [pc.Feature(*row) for row in rows]):
        assert torch.equal(result.effect(features), expected.effect([(1, 4, 2), (2, 5, 3)]))
    steered = pc.Intervention(number(0), slice(number(1), None), number(5), 2.0)
    assert len(pc.generate(model, prompt, [steered], max_new_tokens=number(3), seed=number(1), top_k=number(4))) == 3
    graph = pc.attribute(model, prompt, max_features=4, progress=False)
    assert len(pc.validate(model, graph, samples=number(2), seed=number(0)).nodes) == 2


@INTEGERS
def test_models_and_training(model: pc.ReplacementModel, number: Any, tmp_path: Any) -> None:
    opened = pc.ReplacementModel(model.hf_model, model.transcoders, ignore_positions=number(2))
    assert type(opened.ignore_positions) is int and opened.ignore_positions == 2
    sizes: Any = {"features": 16, "k": 4, "steps": 2, "batch": 8, "context": 7}
    texts = [[number(t) for t in TOKENS]] * 4
    options: Any = {"ignore_positions": number(1), "progress": False, "checkpoint": tmp_path / "run"}
    trained = pc.train(model.hf_model, texts, **{name: number(n) for name, n in sizes.items()}, **options)
    expected = pc.train(model.hf_model, [TOKENS] * 4, **sizes, ignore_positions=1, progress=False)
    assert all(map(torch.equal, trained.w_enc, expected.w_enc))


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.tokens([True, 2]),
        lambda model: pc.attribute(model, TOKENS, max_features=True, progress=False),
        lambda model: pc.attribute(model, TOKENS, position=True, progress=False),
        lambda model: pc.attribute(model, TOKENS, targets=[np.bool_(True)], progress=False),
        lambda model: pc.attribute(model, TOKENS, max_targets=np.bool_(True), progress=False),
        lambda model: pc.Feature(True, 1, 2),
        lambda model: pc.Intervention(0, np.bool_(True), 2, 1.0),
        lambda model: pc.generate(model, TOKENS, max_new_tokens=True),
        lambda model: pc.attribute_many(model, [TOKENS], workers=True),
    ],
)
def test_a_bool_is_not_a_number(model: pc.ReplacementModel, call: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="must"):
        call(model)
