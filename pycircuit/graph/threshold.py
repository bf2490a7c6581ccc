"""Thresholds of scores: the smallest set of the largest scores that carries a share of their sum, without a sort."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_BITS = 16  # of a score's 64, counted in one step: 65,536 counters stay in the cache
_SORT_AT_MOST = 4096  # candidates
# Sums in another order differ in the last digits: a set that falls short by less than this reaches the share, and
# scores closer than this are equal.
_TOLERANCE = 1e-12


def cutoff(scores: np.ndarray | Iterable[np.ndarray], share: float) -> float:
    """The largest cutoff such that the scores >= cutoff carry `share` of the total.

    scores: float64, none negative; [n], or an iterable of chunks that can be iterated again. Equal scores stay or go
    together. A share of 0 keeps the largest, a share of 1 everything above zero; if all are zero, infinity.
    """
    chunks = [scores] if isinstance(scores, np.ndarray) else scores
    if share >= 1:
        return min((float(np.where(chunk > 0, chunk, np.inf).min(initial=np.inf)) for chunk in chunks), default=np.inf)
    candidates = np.zeros(0)
    needed, above = -1.0, 0.0
    # The bits of non-negative floats, read as integers, are in the order of the floats.
    for shift in range(64 - _BITS, -1, -_BITS):
        count, mass = _histogram(chunks, shift)
        needed = share * float(mass.sum()) * (1 - _TOLERANCE) if needed < 0 else needed
        filled = np.flatnonzero(count)
        if not len(filled):
            return np.inf
        reached = above + np.cumsum(mass[::-1])[::-1]  # with this digit and all higher ones
        enough = filled[reached[filled] >= needed]
        chosen = int(enough[-1] if len(enough) else filled[0])
        above = float(reached[chosen] - mass[chosen])
        candidates = np.concatenate([chunk[(_digit(chunk, shift) == chosen) & (chunk > 0)] for chunk in chunks])
        chunks = [candidates]
        if len(candidates) <= _SORT_AT_MOST:
            break
    ordered = np.sort(candidates)[::-1]
    index = int(np.searchsorted(above + np.cumsum(ordered), needed))
    return float(ordered[min(index, len(ordered) - 1)]) * (1 - _TOLERANCE)


def _digit(scores: np.ndarray, shift: int) -> np.ndarray:
    return (scores.view(np.int64) >> shift) & ((1 << _BITS) - 1)


def _histogram(chunks: Iterable[np.ndarray], shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Number and sum of the scores above zero with each digit: [2^_BITS] each."""
    count, mass = np.zeros(1 << _BITS, np.int64), np.zeros(1 << _BITS)
    for chunk in chunks:
        digit = _digit(chunk, shift)
        digit_count = np.bincount(digit)
        count[: len(digit_count)] += digit_count
        count[0] -= np.count_nonzero(chunk == 0)
        mass[: len(digit_count)] += np.bincount(digit, chunk)
    return count, mass


def cumulative(scores: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Share of the total carried by all scores at least as large as that of each of the nodes: [len(nodes)].

    Sorts the scores of these nodes alone; every other score is only placed between two of them.
    """
    levels, level = np.unique(scores[nodes], return_inverse=True)
    total = scores.sum()
    if not len(levels) or not total > 0:
        return np.ones(len(nodes))
    bucket = np.searchsorted(levels, scores, side="right")  # 0: below every level
    mass = np.bincount(bucket, scores, minlength=len(levels) + 1)[1:]
    return np.minimum(np.cumsum(mass[::-1])[::-1] / total, 1.0)[level]
