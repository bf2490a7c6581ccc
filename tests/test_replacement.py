"""A replacement model as its user handles it: one prompt or several, another float type, another device."""

from __future__ import annotations

from typing import Any

import builders
import pytest
import torch
from builders import KINDS, replacement

import pycircuit as pc
from pycircuit.ops import SparseFeatures

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = builders.prompt(9)


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % builders.VOCABULARY for letter in text]


def same(features: tuple[SparseFeatures, ...], expected: tuple[SparseFeatures, ...]) -> bool:
    return len(features) == len(expected) and all(
        torch.equal(f.row_ptr, e.row_ptr) and torch.equal(f.index, e.index) and torch.equal(f.value, e.value)
        for f, e in zip(features, expected, strict=True)
    )


def test_activations_of_one_prompt() -> None:
    """Text, ids, or a tensor of ids: features of that prompt, one entry a layer, as in a list of it alone."""
    model = pc.ReplacementModel(builders.build("llama"), builders.transcoders("plt", torch.float32), Letters())
    text = "a tiny text"
    (expected,) = model.activations([text])
    ids = Letters().encode(text)
    prompts: list[Any] = [text, ids, tuple(ids), torch.tensor(ids), torch.tensor([ids])]
    for prompt in prompts:
        features = model.activations(prompt)
        assert isinstance(features, tuple) and same(features, expected)
    assert len(expected) == model.depth and expected[0].positions == len(text)
    assert model.activations([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_to_another_float_type(kind: str) -> None:
    """Model and transcoders move together, and compute as if they had been opened in that type."""
    model = replacement("llama", kind, torch.float64)
    assert model.to(torch.float32) is model and model.dtype == torch.float32
    opened = pc.ReplacementModel(model.hf_model, model.transcoders)
    assert same(model.activations(PROMPT), opened.activations(PROMPT))
    graph = pc.attribute(model, PROMPT, max_features=4, progress=False)
    assert graph.rows.weight.dtype == torch.float32 and graph.certificate < 1e-5


def test_to_a_device() -> None:
    model = replacement("gpt2", "clt", torch.float32)
    expected = model.activations(PROMPT)
    assert model.to("cpu").to(torch.device("cpu"), torch.float32).device == torch.device("cpu")
    assert same(model.activations(PROMPT), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_half_precision(dtype: torch.dtype) -> None:
    """The model is widened as one that was loaded in half precision."""
    model = replacement("llama", "plt", torch.float32).to(dtype)
    assert model.weights.stored == dtype and model.dtype == torch.float32
    assert model.transcoders.w_enc[0].dtype == dtype
    assert torch.isfinite(pc.attribute(model, PROMPT, max_features=4, progress=False).rows.weight).all()
