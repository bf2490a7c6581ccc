"""Recipes on tiny models: their pages run, and the models are what the pages say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_recipe_pages import check_page, run_page

from pycircuit.demo import refusal, tiny_models

PAGES = ("refusal",)

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.mark.parametrize("name", PAGES)
def test_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(name, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", PAGES)
def test_recipe_is_a_page_with_its_figure(name: str) -> None:
    check_page(name)


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
