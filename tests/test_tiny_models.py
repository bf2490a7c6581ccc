"""Tiny models of the recipes, whose pages run in `make test-real`."""

from __future__ import annotations

import pytest
import torch

from pycircuit.demo import refusal, tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")


def test_tiny_stream_has_two_halves() -> None:
    """Attention never moves an embedding, and no step but an MLP's reaches the logits."""
    words = tiny_models.vocabulary(refusal.sentences())
    recipe = refusal.RECIPE._replace(steps=2)
    model = tiny_models.tiny_llama(len(words), recipe)
    tokenizer = tiny_models.NameTokenizer(words)
    tiny_models.learn(model, tokenizer, refusal.sentences()[:8], recipe)
    half = recipe.width // 2
    weights = dict(model.named_parameters())
    assert not weights["model.embed_tokens.weight"][:, half:].any()
    assert not weights["lm_head.weight"][:, :half].any()
    for layer in range(len(recipe.k)):
        attention, mlp = (f"model.layers.{layer}.{name}" for name in ("self_attn", "mlp"))
        assert not weights[f"{attention}.v_proj.weight"][:, :half].any()
        assert not weights[f"{attention}.o_proj.weight"][half:].any()
        assert not weights[f"{mlp}.gate_proj.weight"][:, half:].any()
        assert not weights[f"{mlp}.down_proj.weight"][:half].any()
        assert weights[f"{attention}.v_proj.weight"][:, half:].any()
        assert weights[f"{mlp}.down_proj.weight"][half:].any()


def test_answers_are_learnt_at_their_own_places() -> None:
    sentence = tiny_models.Sentence("what is in a cake ?", "flour")
    tokenizer = tiny_models.NameTokenizer(tiny_models.vocabulary([sentence]))
    ids, labels = tiny_models.padded(tokenizer, [sentence])
    learnt = labels[0] >= 0
    assert learnt.nonzero()[:, 0].tolist() == [len(ids[0]) - 2]
    assert torch.equal(labels[0][learnt], ids[0][-1:])
