"""The smallest set of the largest scores that carries a share of their sum, found without sorting them."""

from __future__ import annotations

import numpy as np

_BITS = 16  # of a score's 64 looked at in one step: 65,536 counters stay in the cache
_SORTED = 4096  # few enough to sort
# Sums in another order differ in the last places: a set that falls short by less than this reaches the share, and
# scores closer than this are equal.
_SLACK = 1e-12


def cutoff(scores: np.ndarray, share: float) -> float:
    """The score down to which one must go so that what is kept carries `share` of the total.

    scores: [n] float64, none negative. Keep `scores >= cutoff`: equal scores stay or go together. A share of 0
    keeps the largest, a share of 1 everything above zero; where all are zero nothing is kept (infinity).
    """
    candidates = scores[scores > 0]
    if not len(candidates):
        return np.inf
    if share >= 1:
        return float(candidates.min())
    needed, above = share * float(candidates.sum()) * (1 - _SLACK), 0.0
    # The bits of non-negative floats, read as integers, are in the order of the floats.
    for shift in range(64 - _BITS, -1, -_BITS):
        if len(candidates) <= _SORTED:
            break
        digit = (candidates.view(np.int64) >> shift) & ((1 << _BITS) - 1)
        filled = np.bincount(digit, minlength=1 << _BITS) > 0
        mass = np.bincount(digit, candidates, minlength=1 << _BITS)
        reached = above + np.cumsum(mass[::-1])[::-1]  # with this digit and all higher ones
        enough = np.flatnonzero(filled & (reached >= needed))
        chosen = int(enough[-1]) if len(enough) else int(np.flatnonzero(filled)[0])
        above = float(reached[chosen] - mass[chosen])
        candidates = candidates[digit == chosen]
    ordered = np.sort(candidates)[::-1]
    at = int(np.searchsorted(above + np.cumsum(ordered), needed))
    return float(ordered[min(at, len(ordered) - 1)]) * (1 - _SLACK)


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
