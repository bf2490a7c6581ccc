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

LEAST = 0.5  # share of a feature's activation that lies at its concept
REACH = 0.2  # how much it counts that the concept's other places are active: a feature may be for a few of its cities


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
    about = subjects(facts)
    known: dict[str, int] = {}
    position: list[int] = []
    pairs: list[tuple[int, int]] = []
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
    return {"two-hop": "capital", "code, two-hop": "code"}.get(kind, kind.removesuffix(" of a state"))


def names(activation: Tensor, where: Places) -> list[str | None]:
    """The concept that each feature is active at, of each column of activation: [places, features].

    It must hold most of a feature's activation; of those that do, the one whose places are most often active.
    """
    place, concept = where.concept.unbind(1)
    ones = torch.ones(len(place))
    size = (len(where.names), len(where.position))
    member = torch.sparse_coo_tensor(torch.stack([concept, place]), ones, size, check_invariants=True).coalesce()
    total = activation.sum(0)
    share = torch.sparse.mm(member, activation) / total.clamp_min(1e-9)
    reach = torch.sparse.mm(member, (activation > 0).float()) / torch.bincount(concept)[:, None]
    best = (share * reach**REACH).masked_fill_(share < LEAST, 0).max(0)
    return [where.names[at] if score > 0 else None for at, score in zip(best.indices, best.values, strict=True)]


def labels(model: ReplacementModel, facts: Facts) -> dict[tuple[int, int], str]:
    """(layer, feature) to its name, of every feature that has one."""
    statements = list(facts.statements())
    prompts = [model.tokens(statement.prompt) for statement in statements]
    words = [model.tokenizer.convert_ids_to_tokens(ids.tolist())[1:] for ids in prompts]
    where, found = places(facts, statements, words), model.activations(prompts)
    starts = torch.tensor([len(ids) - 1 for ids in prompts]).cumsum(0).tolist()
    named = {}
    for layer in range(model.depth):
        dense = torch.zeros(len(where.position), model.transcoders.size(layer))
        for at, each in zip([0, *starts], found, strict=False):
            dense[at + each[layer].position() - 1, each[layer].index] = each[layer].value
        named.update({(layer, f): name for f, name in enumerate(names(dense, where)) if name})
    return named
