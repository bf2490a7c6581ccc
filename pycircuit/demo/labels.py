"""What a feature of the box model stands for, from where it is active: a name for every feature that has one.

Every place of a statement belongs to concepts: its word, the state or country it is about, the answer it asks for,
the kind of statement. A feature is named after the concept whose places are the places it is active at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .facts import Facts, Statement

if TYPE_CHECKING:
    from pycircuit.model import ReplacementModel

LEAST = 0.5  # agreement below which a feature has no name


@dataclass(frozen=True, eq=False)
class Places:
    """Every place of every statement past <bos>. position: [places]; concept: [pairs, 2], place and concept;
    names: of the concepts.
    """

    position: Tensor
    concept: Tensor
    names: list[str]


def subjects(facts: Facts) -> dict[str, str]:
    """The state or country that each name is about."""
    about = {name: country.names[0] for country in facts.countries for name in country.names}
    about.update(facts.state)
    about.update({state: state for state in facts.capital})
    return about


def places(facts: Facts, statements: Sequence[Statement], words: Sequence[Sequence[str]]) -> Places:
    """words: the tokens of each statement, <bos> left out."""
    about, known = subjects(facts), dict[str, int]()
    position, pairs = [], []
    for statement, tokens in zip(statements, words, strict=True):
        subject = next(at for at, word in enumerate(tokens) if word in about)
        for at, word in enumerate(tokens):
            found = [f"“{word}”"]
            if at >= subject:
                found += [about[tokens[subject]], *([tokens[subject]] if at > subject else [])]
            if at == len(tokens) - 1:
                found += [f"say {statement.answer}", f"asks for a {_asked(statement.kind)}"]
            pairs += [(len(position), known.setdefault(name, len(known))) for name in dict.fromkeys(found)]
            position.append(at + 1)
    return Places(torch.tensor(position), torch.tensor(pairs), list(known))


def _asked(kind: str) -> str:
    return {"city": "state", "state": "capital", "two-hop": "capital"}.get(kind, kind)


def label(activation: Tensor, where: Places) -> str | None:
    """The concept that agrees best with where a feature is active (F1 of mass and places). activation: [places]."""
    total = float(activation.sum())
    if total == 0:
        return None
    place, concept = where.concept.unbind(1)
    held = torch.bincount(concept, activation[place].double())
    active = torch.bincount(concept, (activation[place] > 0).double())
    precision, recall = held / total, active / torch.bincount(concept)
    agreement = 2 * precision * recall / (precision + recall).clamp_min(1e-9)
    best = int(agreement.argmax())
    return where.names[best] if agreement[best] >= LEAST else None


def labels(model: ReplacementModel, facts: Facts) -> dict[tuple[int, int], str]:
    """(layer, feature) to its name, of every feature that has one."""
    statements = list(facts.statements())
    prompts = [model.tokens(statement.prompt) for statement in statements]
    words = [model.tokenizer.convert_ids_to_tokens(ids.tolist())[1:] for ids in prompts]
    where, found = places(facts, statements, words), model.activations(prompts)
    named = {}
    for layer in range(model.depth):
        dense = torch.zeros(len(where.position), model.transcoders.size(layer))
        at = 0
        for features in (each[layer] for each in found):
            count = features.positions - 1
            dense[at + features.position() - 1, features.index] = features.value
            at += count
        for feature, activation in enumerate(dense.T.contiguous()):
            if name := label(activation, where):
                named[layer, feature] = name
    return named
