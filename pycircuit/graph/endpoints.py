"""Tokens and targets: the two ends of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of the prompt. ids: [positions] int64; text: the string of each."""

    ids: Tensor
    text: Sequence[str]


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets, the outputs that a graph explains.

    labels: names; ids: [targets] int64 token ids, -1 for a target that is no token; weights: [targets] probabilities
    or the caller's weights; positions: [targets] int64.
    """

    labels: Sequence[str]
    ids: Tensor
    weights: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.labels)
