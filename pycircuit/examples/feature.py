"""Description of one feature's activations, for its file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .token_texts import Corpus, TokenText

BINS = 50
PERCENTILES = np.arange(1, 100) / 100
DIGITS = 6  # of a number in a file


@dataclass(frozen=True)
class ExampleCounts:
    """Numbers of examples: `top` texts, `per_group` tokens of each of `groups` quantiles, `around` beside each."""

    top: int
    groups: int
    per_group: int
    around: int


def describe(
    token: np.ndarray, value: np.ndarray, corpus: Corpus, token_text: TokenText, counts: ExampleCounts
) -> dict[str, Any]:
    """Describe activations of a feature. token, value: [n], tokens ascending and their activations."""
    everywhere = len(token) == corpus.tokens
    low, high = (0.0, 0.0) if not len(value) else (float(value.min()), float(value.max()))
    low, high = (low, high) if everywhere else (min(low, 0.0), max(high, 0.0))
    examples = _Examples(token, value, corpus, token_text, counts.around)
    return {
        "examples_quantiles": [
            {"quantile_name": name, "examples": [examples.example(int(index)) for index in places]}
            for name, places in _groups(token, value, corpus, counts)
        ],
        "act_min": rounded(low),
        "act_max": rounded(high),
        "quantile_values": [rounded(v) for v in np.quantile(value, PERCENTILES)] if len(value) else [],
        "histogram": np.histogram(value, BINS, (low, high))[0].tolist() if len(value) else [],
        "activation_frequency": rounded(len(token) / corpus.tokens),
    }


def _groups(
    token: np.ndarray, value: np.ndarray, corpus: Corpus, counts: ExampleCounts
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, indices of activations) of each group: the highest of each top text, then each quantile's.

    Those of a quantile are evenly spread; quantiles come from the highest down. Equal activations stay in order.
    """
    order = np.argsort(-value, kind="stable")
    if counts.top and len(order):
        _, first = np.unique(corpus.text_of(token[order]), return_index=True)
        yield "Top activations", order[np.sort(first)[: counts.top]]
    for group in range(counts.groups):
        begin, end = (len(order) * n // counts.groups for n in (group, group + 1))
        count = min(counts.per_group, end - begin)
        if count:
            place = begin + (2 * np.arange(count) + 1) * (end - begin) // (2 * count)
            low, high = (100 - 100 * n // counts.groups for n in (group + 1, group))
            yield f"Quantile {low}% to {high}%", order[place]


class _Examples:
    """Examples of one feature; an example that repeats an earlier one is marked."""

    def __init__(
        self, token: np.ndarray, value: np.ndarray, corpus: Corpus, token_text: TokenText, around: int
    ) -> None:
        self.token, self.value, self.corpus, self.token_text, self.around = token, value, corpus, token_text, around
        self._seen: set[tuple[int, ...]] = set()

    def example(self, index: int) -> dict[str, Any]:
        place = int(self.token[index])
        text = int(self.corpus.text_of(np.array(place)))
        begin = max(int(self.corpus.start[text]), place - self.around)
        end = min(int(self.corpus.start[text + 1]), place + self.around + 1)
        first, last = np.searchsorted(self.token, (begin, end))
        acts: list[float] = [0] * (end - begin)
        for token, value in zip(self.token[first:last].tolist(), self.value[first:last].tolist(), strict=True):
            acts[token - begin] = rounded(value)
        ids = self.corpus.ids[begin:end].tolist()
        window = (place - begin, *ids)
        repeated = window in self._seen
        self._seen.add(window)
        return {
            "tokens": [self.token_text(i) for i in ids],
            "tokens_acts_list": acts,
            "train_token_ind": place - begin,
            "is_repeated_datapoint": repeated,
        }


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
