"""Names of the demo model's features, found from where they are active.

Every token of a statement belongs to concepts: its word, the state or country it is about, the answer it asks for,
the kind of statement. A feature is named after the concept whose tokens are the tokens it is active at.
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

LEAST_SHARE = 0.5  # of a feature's activation, at the tokens of its concept
REACH_POWER = 0.2  # weight of the concept's other tokens being active: a feature may be for a few of its cities


@dataclass(frozen=True, eq=False)
class ConceptTokens:
    """Tokens of all statements past <bos>, and the concepts they belong to.

    position: [tokens]; concept: [pairs, 2], token and concept; names: of the concepts.
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


def concept_tokens(facts: Facts, statements: Sequence[Statement], words: Sequence[Sequence[str]]) -> ConceptTokens:
    """Assign the tokens of statements to concepts. words: the tokens of each statement, <bos> left out."""
    about = subjects(facts)
    index: dict[str, int] = {}
    position: list[int] = []
    pairs: list[tuple[int, int]] = []
    for statement, tokens in zip(statements, words, strict=True):
        subject = next(i for i, word in enumerate(tokens) if word in about)
        for i, word in enumerate(tokens):
            concepts = [f"“{word}”"]
            if i >= subject:
                concepts += [about[tokens[subject]], *([tokens[subject]] if i > subject else [])]
            if i == len(tokens) - 1:
                concepts += [f"say {statement.answer}", f"asks for a {_answer_kind(statement.kind)}"]
            pairs += [(len(position), index.setdefault(name, len(index))) for name in dict.fromkeys(concepts)]
            position.append(i + 1)
    return ConceptTokens(torch.tensor(position), torch.tensor(pairs), list(index))


def _answer_kind(kind: str) -> str:
    return {"two-hop": "capital", "code, two-hop": "code"}.get(kind, kind.removesuffix(" of a state"))


def name_features(activation: Tensor, tokens: ConceptTokens) -> list[str | None]:
    """Name each feature after the concept it is active at, or None. activation: [tokens, features].

    The concept must have most of a feature's activation; of those that do, the one whose tokens are most often active.
    """
    token, concept = tokens.concept.unbind(1)
    ones = torch.ones(len(token))
    size = (len(tokens.names), len(tokens.position))
    member = torch.sparse_coo_tensor(torch.stack([concept, token]), ones, size, check_invariants=True).coalesce()
    total = activation.sum(0)
    share = torch.sparse.mm(member, activation) / total.clamp_min(1e-9)
    reach = torch.sparse.mm(member, (activation > 0).float()) / torch.bincount(concept)[:, None]
    best = (share * reach**REACH_POWER).masked_fill_(share < LEAST_SHARE, 0).max(0)
    return [tokens.names[c] if score > 0 else None for c, score in zip(best.indices, best.values, strict=True)]


def feature_names(model: ReplacementModel, facts: Facts) -> dict[tuple[int, int], str]:
    """Names by (layer, feature), of every feature that gets one."""
    statements = list(facts.statements())
    prompts = [model.tokens(statement.prompt) for statement in statements]
    words = [model.tokenizer.convert_ids_to_tokens(ids.tolist())[1:] for ids in prompts]
    tokens = concept_tokens(facts, statements, words)
    activations = model.activations(prompts)
    starts = torch.tensor([len(ids) - 1 for ids in prompts]).cumsum(0).tolist()
    names = {}
    for layer in range(model.depth):
        dense = torch.zeros(len(tokens.position), model.transcoders.size(layer))
        for start, layers in zip([0, *starts], activations, strict=False):
            features = layers[layer]
            dense[start + features.position() - 1, features.index] = features.value
        names.update({(layer, f): name for f, name in enumerate(name_features(dense, tokens)) if name})
    return names
