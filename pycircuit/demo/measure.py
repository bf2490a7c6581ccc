"""What the box is worth: what its model knows, what its transcoders explain, whether it says the same with them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pycircuit.graph.show.tree import strongest
from pycircuit.interventions import intervene

from .facts import Facts, Statement
from .swap import swap, two_hop

if TYPE_CHECKING:
    from pycircuit.graph import Graph
    from pycircuit.model import ReplacementModel


def answers(model: ReplacementModel, statements: Sequence[Statement], replaced: bool = False) -> Tensor:
    """The likeliest completion of each prompt: [statements]. replaced: every MLP by its reconstruction, no errors."""
    from pycircuit.training.evaluate import replaced_logits

    ids = [model.tokens(statement.prompt) for statement in statements]
    out = torch.zeros(len(ids), dtype=torch.int64)
    for length in sorted({len(row) for row in ids}):
        at = [i for i, row in enumerate(ids) if len(row) == length]
        batch = torch.stack([ids[i] for i in at])
        with torch.no_grad():
            logits = replaced_logits(model, batch) if replaced else model.hf_model(batch, use_cache=False).logits
        out[at] = logits[:, -1].argmax(-1)
    return out


def accuracy(model: ReplacementModel, statements: Sequence[Statement]) -> dict[str, float]:
    """Share of right answers by kind; statements that were held out are a kind of their own."""
    said = [model.tokenizer.decode(int(token)) for token in answers(model, statements)]
    kinds: dict[str, list[bool]] = {}
    for statement, word in zip(statements, said, strict=True):
        kind = statement.kind + (", held out" if statement.held_out else "")
        kinds.setdefault(kind, []).append(word == statement.answer)
    return {kind: sum(right) / len(right) for kind, right in kinds.items()}


def agreement(model: ReplacementModel, statements: Sequence[Statement]) -> float:
    """Share of prompts that the replacement model completes as the model does."""
    return float((answers(model, statements) == answers(model, statements, replaced=True)).float().mean())


def labelled_path(graph: Graph) -> list[str]:
    """What lies on the strongest path to the first target, from the token up: labels, or what names a node."""
    path = strongest(graph, 0)
    found = [graph.describe(node) for node in (path.nodes if path else ())]
    return [str(a.get("label") or f"L{a['layer']}/{a.get('feature', 'error')}") for a in found]


class Swapped(NamedTuple):
    """What is said of the city `here` when the features of its state stand back for those of the state of `there`."""

    here: str
    there: str
    features: int  # changed
    said: str
    wanted: str


def swaps(model: ReplacementModel, facts: Facts, pairs: int = 50, seed: int = 0, factor: float = 1.0) -> list[Swapped]:
    """Pairs of states and a city of each, drawn at random. Nothing but the features is held: all that follows runs."""
    draw, cities = random.Random(seed), dict[str, list[str]]()
    for city, state in facts.state.items():
        cities.setdefault(state, []).append(city)
    out = []
    for _ in range(pairs):
        first, second = draw.sample(sorted(facts.capital), 2)
        here, there = draw.choice(cities[first]), draw.choice(cities[second])
        changes = swap(model, two_hop(here), first, two_hop(there), second, factor)
        said = ""
        if changes:
            result = intervene(model, two_hop(here), changes, freeze="none")
            said = model.tokenizer.decode(int(result.probabilities.argmax()))
        out.append(Swapped(here, there, len(changes), said, facts.capital[second]))
    return out
