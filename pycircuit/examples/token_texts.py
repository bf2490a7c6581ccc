"""Texts of the examples, as one row of tokens, and the text of a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts one after another.

    ids: [tokens] int64; start: [texts + 1], their first tokens; ignored: opening positions of a text without features.
    """

    ids: np.ndarray
    start: np.ndarray
    ignored: int

    @classmethod
    def of(cls, texts: list[Tensor], ignored: int) -> Corpus:
        start = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(ids) for ids in texts], out=start[1:])
        return cls(torch.cat(texts).numpy(), start, ignored)

    @cached_property
    def tokens(self) -> int:
        """Number of tokens that can have features."""
        return int(np.maximum(np.diff(self.start) - self.ignored, 0).sum())

    def text_of(self, token: np.ndarray) -> np.ndarray:
        """The text that each token is in."""
        return np.searchsorted(self.start, token, side="right") - 1

    def batches(self, positions: int) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield (first token of the batch, texts as lists of ids), about `positions` tokens at a time."""
        first, texts = 0, len(self.start) - 1
        while first < texts:
            last = int(np.searchsorted(self.start, self.start[first] + positions, side="right")) - 1
            last = max(first + 1, last)
            bounds = self.start[first : last + 1]
            yield int(bounds[0]), [self.ids[a:b].tolist() for a, b in pairwise(bounds)]
            first = last


class TokenText:
    """The text of a token, as graphs show it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._cache:
            self._cache[token] = str(token) if self.tokenizer is None else str(self.tokenizer.decode([token]))
        return self._cache[token]
