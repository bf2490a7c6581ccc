"""The smallest set of the largest scores that carries a share of their sum, found without sorting them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_BITS = 16  # of a score's 64 looked at in one step: 65,536 counters stay in the cache
_SORTED = 4096  # few enough to sort
# Sums in another order differ in the last places: a set that falls short by less than this reaches the share, and
# scores closer than this are equal.
_SLACK = 1e-12


def cutoff(scores: np.ndarray | Iterable[np.ndarray], share: float) -> float:
    """The score down to which one must go so that what is kept carries `share` of the total.

    scores: float64, none negative; [n], or in parts that can be gone through again and need not be held together.
    Keep `scores >= cutoff`: equal scores stay or go together. A share of 0 keeps the largest, a share of 1 everything
    above zero; where all are zero nothing is kept (infinity).
    """
    parts = [scores] if isinstance(scores, np.ndarray) else scores
    if share >= 1:
        return min((float(np.where(part > 0, part, np.inf).min(initial=np.inf)) for part in parts), default=np.inf)
    candidates, needed, above = np.zeros(0), -1.0, 0.0
    # The bits of non-negative floats, read as integers, are in the order of the floats.
    for shift in range(64 - _BITS, -1, -_BITS):
        count, mass = _histogram(parts, shift)
        needed = share * float(mass.sum()) * (1 - _SLACK) if needed < 0 else needed
        filled = np.flatnonzero(count)
        if not len(filled):
            return np.inf
        reached = above + np.cumsum(mass[::-1])[::-1]  # with this digit and all higher ones
        enough = filled[reached[filled] >= needed]
        chosen = int(enough[-1] if len(enough) else filled[0])
        above = float(reached[chosen] - mass[chosen])
        candidates = np.concatenate([part[(_digit(part, shift) == chosen) & (part > 0)] for part in parts])
        parts = [candidates]
        if len(candidates) <= _SORTED:
            break
    ordered = np.sort(candidates)[::-1]
    at = int(np.searchsorted(above + np.cumsum(ordered), needed))
    return float(ordered[min(at, len(ordered) - 1)]) * (1 - _SLACK)


def _digit(scores: np.ndarray, shift: int) -> np.ndarray:
    return (scores.view(np.int64) >> shift) & ((1 << _BITS) - 1)


def _histogram(parts: Iterable[np.ndarray], shift: int) -> tuple[np.ndarray, np.ndarray]:
    """How many scores above zero have each digit, and their sum: [2^_BITS] each."""
    count, mass = np.zeros(1 << _BITS, np.int64), np.zeros(1 << _BITS)
    for part in parts:
        digit = _digit(part, shift)
        found = np.bincount(digit)
        count[: len(found)] += found
        count[0] -= np.count_nonzero(part == 0)
        mass[: len(found)] += np.bincount(digit, part)
    return count, mass


def cumulative(scores: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Share of the total carried by all scores at least as large as each of the wanted: [wanted].

    Sorts the wanted ones alone; every other score is only put between two of them.
    """
    levels, place = np.unique(scores[wanted], return_inverse=True)
    total = scores.sum()
    if not len(levels) or not total > 0:
        return np.ones(len(wanted))
    bucket = np.searchsorted(levels, scores, side="right")  # 0: below every level
    mass = np.bincount(bucket, scores, minlength=len(levels) + 1)[1:]
    return np.minimum(np.cumsum(mass[::-1])[::-1] / total, 1.0)[place]
