"""Contrasts: targets that ask why the model prefers one token, or one set of tokens, to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from pycircuit.ops import checks

if TYPE_CHECKING:
    from pycircuit.graph import Graph

Side: TypeAlias = tuple[int, ...]
KEY = "contrasts"  # of a graph's provenance: the token ids of both sides, by the target's label


@dataclass(frozen=True)
class Contrast:
    """Difference of logits as a target: the mean logit of `tokens` minus the mean logit of `against`.

    Each side is a token id, a token string, or a list of them. Means and not sums: a constant that is added to every
    logit changes no probability, and with means it changes no contrast, however many tokens a side has.
    """

    tokens: int | str | Sequence[int | str]
    against: int | str | Sequence[int | str]

    def __post_init__(self) -> None:
        for name in ("tokens", "against"):
            value = getattr(self, name)
            side = (value,) if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
            if not side:
                raise ValueError(f"Contrast: {name} must have at least one token, got none")
            for token in side:
                if not isinstance(token, str) and not checks.is_int(token):
                    raise TypeError(f"Contrast: {name} must be token ids or token strings, got {token!r}")
            object.__setattr__(self, name, side)

    def sides(self, token_id: Callable[[Any], int]) -> tuple[Side, Side]:
        """Return the ids of both sides; no token may occur twice, since it would cancel or count double."""
        first, second = (tuple(token_id(token) for token in side) for side in (self.tokens, self.against))  # type: ignore[union-attr]
        repeated = sorted({token for token in first + second if (first + second).count(token) > 1})
        if repeated:
            raise ValueError(f"Contrast: tokens must be distinct and on one side only, got token {repeated[0]} twice")
        return first, second


def contrast_label(sides: tuple[Iterable[str], Iterable[str]]) -> str:
    """Return the name of a contrast, from the texts of its tokens: Austin − Sacramento."""
    texts = [list(side) for side in sides]
    bare = [[text.strip() for text in side] for side in texts]
    every = [text for side in bare for text in side]
    if all(every) and len(set(every)) == len(every):
        texts = bare
    return " − ".join(", ".join(side) for side in texts)


def direction(unembedding: Tensor, sides: tuple[Side, Side]) -> Tensor:
    """Return the mean unembedding row of the first side minus that of the second: [width] float64."""
    first, second = (unembedding[torch.tensor(side, device=unembedding.device)].double().mean(0) for side in sides)
    return first - second


def contrasts_of(op: str, graph: Graph, vocabulary: int) -> dict[int, tuple[Side, Side]]:
    """Return the sides of a graph's contrasts by target. op: what errors begin with; vocabulary: the model's tokens."""
    known = graph.provenance.get(KEY, {})
    result = {}
    for target, (name, token) in enumerate(zip(graph.targets.labels, graph.targets.ids.tolist(), strict=True)):
        if token >= 0 or not isinstance(known, dict) or name not in known:
            continue
        sides = known[name]
        tokens = [*sides[0], *sides[1]] if isinstance(sides, list) and list(map(type, sides)) == [list, list] else []
        if not tokens or not all(sides) or not all(type(t) is int and 0 <= t < vocabulary for t in tokens):
            raise ValueError(f"{op}: a contrast must have two lists of token ids of this model, got {str(sides)[:80]}")
        result[target] = (tuple(sides[0]), tuple(sides[1]))
    return result
