"""Presets of the trainer: a model, a recipe, and texts that package registries have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import corpora
from .corpora import SPEECHES as SPEECHES
from .recipe import Recipe

# The model's own template, of a conversation of one turn.
SMOLLM2_TURN = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
)


@dataclass(frozen=True)
class Preset:
    """A model as pc.load takes it, a recipe, and texts(held_out): those of evaluation, or those of training."""

    model: str
    recipe: Recipe
    texts: Callable[[bool], list[str]]


def speeches(held_out: bool, start: Path | None = None) -> list[str]:
    """Read the State of the Union speeches, 1790 to today, from the npm package installed in a folder or above it.

    start: the folder to begin at; None: the working directory.
    """
    return corpora.mixture([corpora.speeches(start)], held_out, 1)


def smollm2_texts(held_out: bool) -> list[str]:
    """Speeches, glosses, questions on words in the model's template, and dictionaries and fortunes where installed.

    held_out: texts of another corpus, Python's language reference.
    """
    if held_out:
        return corpora.python_reference().texts

    def turn(question: str, answer: str) -> str:
        return SMOLLM2_TURN.format(question=question, answer=answer)

    mixed = [corpora.speeches(), corpora.wordnet(), corpora.chat(turn)]
    mixed += [corpora.dictionary("foldoc"), corpora.dictionary("jargon"), corpora.fortunes()]
    return corpora.mixture(mixed, False, 3)


SMOLLM2_RECIPE = Recipe(features=4096, steps=700, k=64, skip=True, rows="tokens", rate=1e-3, warmup=20)
PRESETS = {"smollm2": Preset("smollm2", SMOLLM2_RECIPE, smollm2_texts)}
