"""Torch's settings around a call: autocast, default type and inference mode change no number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import builders
import pytest
import torch
from builders import replacement

import pycircuit as pc
from pycircuit.trace import row_store
from pycircuit.training.evaluate import replaced_logits

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_change_no_number(name: str) -> None:
    model, prompt = replacement("llama", "plt", torch.float32), builders.prompt()
    changes, direction = [pc.Intervention(1, 3, 5, 4.0)], torch.arange(model.width) / model.width
    targets = [("a", 1.0, direction), ("b", 0.3, direction - 0.7)]

    def results() -> list[Any]:
        graph = pc.attribute(model, prompt, targets=targets, max_features=20, progress=False)
        after = pc.intervene(model, prompt, changes)
        values = [f.value for layers in model.activations([prompt, prompt[:5]]) for f in layers]
        tensors = [graph.rows.weight, graph.row_node, graph.values, after.logits, after.probabilities, *values]
        return [*tensors, replaced_logits(model, model.tokens(prompt)[None]), *pc.generate(model, [prompt], changes)]

    expected = results()
    with SETTINGS[name]():
        assert pc.ReplacementModel(model.hf_model, model.transcoders).depth == model.depth
        got = results()
        assert torch.is_autocast_enabled("cpu") == (name == "autocast")
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def test_targets_keep_their_weights_in_the_ranking(monkeypatch: Any) -> None:
    """Weights have the model's own precision, whatever torch's default is."""
    model, weights, influence = replacement("llama", "plt", torch.float64), [], row_store.RowStore.influence

    def recorded(self: row_store.RowStore, order: Any, node: Any, weight: Any) -> Any:
        weights.append(weight[0].item())
        return influence(self, order, node, weight)

    monkeypatch.setattr(row_store.RowStore, "influence", recorded)
    with default_dtype(torch.bfloat16):
        target = ("a", 1 / 3, torch.ones(model.width, dtype=torch.float64))
        pc.attribute(model, builders.prompt(), targets=[target], max_features=9, progress=False)
    assert set(weights) == {1 / 3}
