"""What the file of one feature says of its activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .token_texts import Corpus, Words

BINS = 50
PERCENTILES = np.arange(1, 100) / 100
DIGITS = 6  # of a number in a file


@dataclass(frozen=True)
class Layout:
    """How much is shown: of each feature, its `top` texts, and `each` tokens of each of `groups` quantiles, with
    `around` tokens on either side.
    """

    top: int
    groups: int
    each: int
    around: int


def describe(token: np.ndarray, value: np.ndarray, corpus: Corpus, words: Words, layout: Layout) -> dict[str, Any]:
    """token, value: [n], where a feature is active, in the order of tokens."""
    everywhere = len(token) == corpus.tokens
    low, high = (0.0, 0.0) if not len(value) else (float(value.min()), float(value.max()))
    low, high = (low, high) if everywhere else (min(low, 0.0), max(high, 0.0))
    shown = _Shown(token, value, corpus, words, layout.around)
    return {
        "examples_quantiles": [
            {"quantile_name": name, "examples": [shown.example(int(at)) for at in places]}
            for name, places in _groups(token, value, corpus, layout)
        ],
        "act_min": rounded(low),
        "act_max": rounded(high),
        "quantile_values": [rounded(v) for v in np.quantile(value, PERCENTILES)] if len(value) else [],
        "histogram": np.histogram(value, BINS, (low, high))[0].tolist() if len(value) else [],
        "activation_frequency": rounded(len(token) / corpus.tokens),
    }


def _groups(token: np.ndarray, value: np.ndarray, corpus: Corpus, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    """(name, which activations): the highest one of each of the `top` texts; then, from the highest quantile down,
    evenly spread ones. Of equal ones the first comes first.
    """
    order = np.argsort(-value, kind="stable")
    if layout.top and len(order):
        _, first = np.unique(corpus.text_of(token[order]), return_index=True)
        yield "Top activations", order[np.sort(first)[: layout.top]]
    for group in range(layout.groups):
        begin, end = (len(order) * n // layout.groups for n in (group, group + 1))
        count = min(layout.each, end - begin)
        if count:
            place = begin + (2 * np.arange(count) + 1) * (end - begin) // (2 * count)
            low, high = (100 - 100 * n // layout.groups for n in (group + 1, group))
            yield f"Quantile {low}% to {high}%", order[place]


class _Shown:
    """Examples of one feature; one that shows the same as another before it says so."""

    def __init__(self, token: np.ndarray, value: np.ndarray, corpus: Corpus, words: Words, around: int) -> None:
        self.token, self.value, self.corpus, self.words, self.around = token, value, corpus, words, around
        self._seen: set[tuple[int, ...]] = set()

    def example(self, at: int) -> dict[str, Any]:
        place = int(self.token[at])
        text = int(self.corpus.text_of(np.array(place)))
        begin = max(int(self.corpus.start[text]), place - self.around)
        end = min(int(self.corpus.start[text + 1]), place + self.around + 1)
        first, last = np.searchsorted(self.token, (begin, end))
        acts: list[float] = [0] * (end - begin)
        for where, value in zip(self.token[first:last].tolist(), self.value[first:last].tolist(), strict=True):
            acts[where - begin] = rounded(value)
        ids = self.corpus.ids[begin:end].tolist()
        key = (place - begin, *ids)
        repeated = key in self._seen
        self._seen.add(key)
        return {
            "tokens": [self.words(i) for i in ids],
            "tokens_acts_list": acts,
            "train_token_ind": place - begin,
            "is_repeated_datapoint": repeated,
        }


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
