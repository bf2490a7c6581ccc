"""Facts that the demo model's features follow, measured on every statement: the truth that groups are judged by.

A feature belongs to the slot of a sentence (subject, word of the question, last token, other) where most of its
activation lies. In that slot, its fact is the one whose values explain most of the variance of its activation
(omega squared, which counts the number of values): state, country, answer (the capital, code, currency or language
asked for), language of the sentence, or kind of question. No label is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pycircuit.demo.facts import COUNTRY, Facts, Statement
from pycircuit.demo.feature_names import subjects
from pycircuit.model import ReplacementModel

SLOTS = ("subject", "question", "last", "other")
FACTS = ("state", "country", "answer", "language", "kind")
_LEAST = 0.05  # of the variance: a feature that no fact explains is not judged
_NONE = "-"
_QUESTION_WORDS = {"capital": "capital", "code": "code"} | {
    template.split()[1 if template.startswith("the") else -1]: kind
    for kind, templates in COUNTRY.items()
    for template in templates
}


def language(prompt: str) -> str:
    """Language of a statement's prompt, by its first word."""
    return {"le": "fr", "el": "es"}.get(prompt.split()[0], "en")


def fact_classes(model: ReplacementModel, facts: Facts) -> dict[tuple[int, int], str]:
    """The fact of each feature that one explains, by (layer, feature)."""
    statements = list(facts.statements())
    prompts = [model.tokens(statement.prompt) for statement in statements]
    words = [model.tokenizer.convert_ids_to_tokens(ids.tolist())[1:] for ids in prompts]
    rows = [row for s, tokens in zip(statements, words, strict=True) for row in _token_facts(facts, s, tokens)]
    slot = np.array([row[0] for row in rows])
    values = [np.unique([row[1 + i] for row in rows], return_inverse=True)[1] for i in range(len(FACTS))]
    activations = model.activations(prompts)
    starts = np.cumsum([0, *(len(ids) - 1 for ids in prompts)])
    out = {}
    for layer in range(model.depth):
        dense = np.zeros((len(rows), model.transcoders.size(layer)), np.float32)
        for start, layers in zip(starts, activations, strict=False):
            features = layers[layer]
            dense[start + features.position().numpy() - 1, features.index.numpy()] = features.value.numpy()
        out.update({(layer, f): fact for f, fact in _explained(dense, slot, values).items()})
    return out


def _token_facts(facts: Facts, statement: Statement, tokens: Sequence[str]) -> list[tuple[str, ...]]:
    """Slot of each token, and the facts that are known there."""
    about = subjects(facts)
    subject = next(i for i, word in enumerate(tokens) if word in about)
    last = len(tokens) - 1
    question = next((i for i, word in enumerate(tokens) if word in _QUESTION_WORDS), last)
    name = about[tokens[subject]]
    is_state = name in facts.capital
    kind = {"two-hop": "capital", "code, two-hop": "code"}.get(statement.kind, statement.kind.split(" of ")[0])
    rows = []
    for i in range(len(tokens)):
        slot = "last" if i == last else "subject" if i == subject else "question" if i == question else "other"
        known = name if i >= subject else _NONE
        rows.append(
            (
                slot,
                known if is_state else _NONE,
                _NONE if is_state else known,
                statement.answer if i == last else _NONE,
                language(statement.prompt),
                kind if i >= question else _NONE,
            )
        )
    return rows


def _explained(dense: np.ndarray, slot: np.ndarray, values: Sequence[np.ndarray]) -> dict[int, str]:
    """The fact of each feature of a layer. dense: activations [tokens, features]."""
    mass = np.stack([dense[slot == name].sum(0) for name in SLOTS])
    own_slot, active = mass.argmax(0), mass.max(0) > 0
    out = {}
    for i, name in enumerate(SLOTS):
        features = np.flatnonzero(active & (own_slot == i))
        tokens = np.flatnonzero(slot == name)
        if len(features):
            share = np.stack([_omega_squared(dense[np.ix_(tokens, features)], v[tokens]) for v in values])
            best = share.argmax(0)
            out.update({int(f): FACTS[best[j]] for j, f in enumerate(features) if share[best[j], j] > _LEAST})
    return out


def _omega_squared(activation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Share of the variance of each column that groups of rows explain, unbiased by the number of groups."""
    x = activation.astype(np.float64)
    group = np.unique(value, return_inverse=True)[1]
    count = np.bincount(group)
    if len(count) < 2:
        return np.full(x.shape[1], -1.0)
    sums = np.stack([np.bincount(group, column, minlength=len(count)) for column in x.T], axis=1)
    mean = x.mean(0)
    total = ((x - mean) ** 2).sum(0)
    between = (sums**2 / count[:, None]).sum(0) - len(x) * mean**2
    within = (total - between) / max(1, len(x) - len(count))
    scale = total + within
    return np.divide(between - (len(count) - 1) * within, scale, out=np.zeros_like(total), where=scale > 0)
