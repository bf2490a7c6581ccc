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


_CHARACTERS = 4_000_000  # of a corpus of SmolLM2's preset, at most; of Python modules, which vary more, twice as many


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
    """Speeches, glosses, questions on words in the model's template, Python modules, and dictionaries where installed.

    held_out: texts of another corpus, Python's language reference.
    """
    if held_out:
        return corpora.python_reference().texts

    def turn(question: str, answer: str) -> str:
        return SMOLLM2_TURN.format(question=question, answer=answer)

    mixed = [corpora.speeches(), corpora.wordnet(), corpora.chat(turn)]
    mixed += [corpora.dictionary("foldoc"), corpora.dictionary("jargon"), corpora.fortunes()]
    mixed = [corpus.limited(_CHARACTERS) for corpus in mixed]
    return corpora.mixture([*mixed, corpora.python_sources(2 * _CHARACTERS)], False, 3)


# Many small steps: 58 of 1,024 tokens explain less than 117 of 512, and these less than 234 of 256.
SMOLLM2_RECIPE = Recipe(
    features=4096,
    steps=2000,
    k=64,
    skip=True,
    rows="tokens",
    batch=256,
    rate=2e-3,
    warmup=20,
    decay=0.5,
    forward="bfloat16",
)
PRESETS = {"smollm2": Preset("smollm2", SMOLLM2_RECIPE, smollm2_texts)}
