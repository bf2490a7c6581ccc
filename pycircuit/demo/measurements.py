"""Measurements of the demo model: its answers, its answers with transcoders, and swaps of features."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pycircuit.graph.paths import strongest_path
from pycircuit.interventions import intervene
from pycircuit.trace import attribute

from .circuit_shares import CircuitShares, circuit_shares, concepts
from .facts import Facts, Statement
from .swap import swap, two_hop

if TYPE_CHECKING:
    from pycircuit.graph import Graph
    from pycircuit.model import ReplacementModel


def answers(model: ReplacementModel, statements: Sequence[Statement], replaced: bool = False) -> Tensor:
    """The likeliest completion of each prompt, a token id: [statements].

    replaced: every MLP runs as its reconstruction, without errors.
    """
    from pycircuit.training.evaluate import replaced_logits

    ids = [model.tokens(statement.prompt) for statement in statements]
    out = torch.zeros(len(ids), dtype=torch.int64)
    for length in sorted({len(row) for row in ids}):
        indices = [i for i, row in enumerate(ids) if len(row) == length]
        batch = torch.stack([ids[i] for i in indices])
        with torch.no_grad():
            logits = replaced_logits(model, batch) if replaced else model.hf_model(batch, use_cache=False).logits
        out[indices] = logits[:, -1].argmax(-1)
    return out


def accuracy(model: ReplacementModel, statements: Sequence[Statement]) -> dict[str, float]:
    """Share of right answers by kind; statements that were held out are a kind of their own."""
    words = [model.tokenizer.decode(int(token)) for token in answers(model, statements)]
    kinds: dict[str, list[bool]] = {}
    for statement, word in zip(statements, words, strict=True):
        kind = statement.kind + (", held out" if statement.held_out else "")
        kinds.setdefault(kind, []).append(word == statement.answer)
    return {kind: sum(right) / len(right) for kind, right in kinds.items()}


def agreement(model: ReplacementModel, statements: Sequence[Statement]) -> float:
    """Share of prompts that the replacement model completes as the model does."""
    return float((answers(model, statements) == answers(model, statements, replaced=True)).float().mean())


def labelled_path(graph: Graph) -> list[str]:
    """Labels, or other names, of the nodes on the strongest path to the first target, from the token up."""
    path = strongest_path(graph)
    descriptions = [graph.describe(node) for node in (path.nodes if path else ())]
    return [str(d.get("label") or f"L{d['layer']}/{d.get('feature', 'error')}") for d in descriptions]


class Swapped(NamedTuple):
    """Answer about `city` with the features of its state off and those of the state of `other_city` on."""

    city: str
    other_city: str
    features: int  # changed
    answer: str
    expected: str


def swaps(model: ReplacementModel, facts: Facts, pairs: int = 50, seed: int = 0) -> list[Swapped]:
    """Swap the features of pairs of states, on a city of each, drawn at random; whatever follows the features runs."""
    draw = random.Random(seed)
    cities = cities_by_state(facts)
    out = []
    for _ in range(pairs):
        first, second = draw.sample(sorted(facts.capital), 2)
        city, other_city = draw.choice(cities[first]), draw.choice(cities[second])
        changes = swap(model, two_hop(city), first, two_hop(other_city), second)
        answer = ""
        if changes:
            result = intervene(model, two_hop(city), changes, freeze="none")
            answer = model.tokenizer.decode(int(result.probabilities.argmax()))
        out.append(Swapped(city, other_city, len(changes), answer, facts.capital[second]))
    return out


def cities_by_state(facts: Facts) -> dict[str, list[str]]:
    """Cities of each state."""
    cities: dict[str, list[str]] = {}
    for name, state in facts.state.items():
        cities.setdefault(state, []).append(name)
    return cities


def state_circuits(model: ReplacementModel, facts: Facts, seed: int = 0) -> dict[str, CircuitShares]:
    """Shares of the influence on the answer about a city of each state, drawn at random, by city."""
    draw = random.Random(seed)
    out = {}
    for _, cities in sorted(cities_by_state(facts).items()):
        city = draw.choice(cities)
        graph = attribute(model, two_hop(city), progress=False)
        out[city] = circuit_shares(graph, concepts(graph, facts, city))
    return out
