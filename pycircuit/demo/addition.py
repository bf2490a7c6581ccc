"""A tiny model that adds two digits, asked for in two forms: sentences, training and the tables of its features.

The answer has two tokens: the tens digit, for which it is enough whether the sum reaches ten, and the ones digit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycircuit.model import ReplacementModel

from .tiny_models import Recipe, Sentence, active, tiny_model

DIGITS = range(10)
SYMBOLS, WORDS = "{} + {} =", "the total of {} and {} is"
RECIPE = Recipe(steps=400, features=128, k=(1, 8), transcoder_steps=400)


def prompt(form: str, a: int, b: int, tens: bool = True) -> str:
    """The question for a sum, with the tens digit of the answer or without."""
    return form.format(a, b) + f" {(a + b) // 10}" * tens


def sentences() -> list[Sentence]:
    """Every sum in symbols, and in words all but those of `unseen`."""
    learnt = [_sum(form, a, b) for form in (SYMBOLS, WORDS) for a in DIGITS for b in DIGITS]
    return [sentence for sentence in learnt if sentence not in unseen()]


def unseen() -> list[Sentence]:
    """Twenty sums in words that are learnt in symbols alone."""
    return [_sum(WORDS, a, (3 * a + shift) % 10) for a in DIGITS for shift in (0, 5)]


def _sum(form: str, a: int, b: int) -> Sentence:
    return Sentence(prompt(form, a, b, tens=False), f"{(a + b) // 10} {(a + b) % 10}")


def tables(model: ReplacementModel, form: str, tens: bool = True) -> Tensor:
    """Activations of the last layer's features at the last token: [features, 10, 10], by both digits."""
    layer = model.depth - 1
    result = torch.zeros(model.transcoders.size(layer), len(DIGITS), len(DIGITS))
    for a in DIGITS:
        for b in DIGITS:
            text = prompt(form, a, b, tens)
            for feature, value in active(model, text, layer, len(text.split())).items():
                result[feature, a, b] = value
    return result


def explained(table: Tensor, classes: Tensor) -> float:
    """Share of a table's variance that lies between the classes of its entries; both [10, 10]."""
    means = torch.stack([table[classes == label].mean() for label in classes.unique()])
    fitted = means[torch.searchsorted(classes.unique(), classes)]
    return 1 - float((table - fitted).square().sum() / (table - table.mean()).square().sum())


def addition_model() -> ReplacementModel:
    """Train the model and its transcoders: some seconds on one core."""
    return tiny_model(sentences(), RECIPE, unseen())
