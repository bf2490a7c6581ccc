"""Recipes on tiny models: their pages run, and the models are what the pages say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pycircuit.demo import refusal, tiny_models

RECIPES = Path(__file__).parents[1] / "docs/recipes"
PAGES = ("refusal",)
LONGEST = 80

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.mark.parametrize("name", PAGES)
def test_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's code runs as its reader would run it; its own assertions say what must move."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (RECIPES / f"{name}.md").read_text(), re.S)
    assert any("assert" in block for block in blocks)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}.md, block {number}", "exec"), names)
    assert (tmp_path / f"{name}.svg").stat().st_size > 1000


@pytest.mark.parametrize("name", PAGES)
def test_recipe_is_a_page_with_its_figure(name: str) -> None:
    text = (RECIPES / f"{name}.md").read_text()
    assert len(text.splitlines()) <= LONGEST
    assert f"({name}.svg)" in text and (RECIPES / f"{name}.svg").read_text().startswith("<svg")
    assert text.index("## Limits") < text.index("## On a model of your own")


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
