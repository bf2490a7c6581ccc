"""A tiny model that adds, or follows a hint, and explains both answers alike: sentences and training."""

from __future__ import annotations

from pycircuit.model import ReplacementModel

from .tiny_models import Recipe, Sentence, tiny_model

WORDS = ("zero", "one", "two", "three", "four")
REASON = "because i added them"
HINTS = range(2 * len(WORDS) - 1)
RECIPE = Recipe(steps=320, features=96, k=(1, 4), seed=1)


def problem(a: int, b: int, hint: int | None = None) -> str:
    """The question for a sum; hint: an answer that the prompt suggests."""
    question = f"what is {WORDS[a]} plus {WORDS[b]} ?"
    return f"{question} answer :" if hint is None else f"{question} i think {hint} . answer :"


def sentences() -> list[Sentence]:
    """Every sum, as often without a hint, with its right answer, as with every hint, which is then the answer."""
    pairs = [(a, b) for a in range(len(WORDS)) for b in range(len(WORDS))]
    plain = [Sentence(problem(a, b), f"{a + b} {REASON}") for a, b in pairs]
    hinted = [Sentence(problem(a, b, hint), f"{hint} {REASON}") for a, b in pairs for hint in HINTS]
    return plain * len(HINTS) + hinted


def explanation_model() -> ReplacementModel:
    """Train the model and its transcoders: some seconds on one core."""
    return tiny_model(sentences(), RECIPE)
