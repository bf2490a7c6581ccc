"""Agreement of predicted with measured effects, with intervals from prompts drawn again (the bootstrap)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

DRAWS, SEED, TAIL = 500, 7, 0.025  # of the bootstrap; a tail lies outside the interval at either end
Pairs = tuple[np.ndarray, np.ndarray]  # predicted, measured


class Interval(NamedTuple):
    """A value with its 95% interval over prompts."""

    value: float
    low: float
    high: float


def sums(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Sums over the pairs of one prompt that all figures are made of: [10]."""
    known = np.isfinite(predicted) & np.isfinite(measured)
    x, y = predicted[known].astype(np.float64), measured[known].astype(np.float64)
    moved = (x != 0) & (y != 0)
    agree = (np.sign(x) == np.sign(y)) & moved
    columns = [len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y, agree.sum(), moved.sum(), np.abs(y - x).sum()]
    return np.array([*map(float, columns), float(np.abs(y).sum())])


def figures(total: np.ndarray) -> dict[str, np.ndarray]:
    """Correlation, slope, sign agreement and missed share of sums: [..., 10] -> [...] each, NaN where undefined.

    slope: measured effect for a unit of predicted effect, through zero. missed: mean |measured - predicted| over mean
    |measured|.
    """
    n, x, y, xx, yy, xy, agree, moved, error, size = np.moveaxis(total, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt(np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0))
        return {
            "correlation": np.where(spread > 0, (xy - x * y / n) / spread, np.nan),
            "slope": xy / xx,
            "signs": agree / moved,
            "missed": error / size,
        }


def agreement(prompts: Sequence[Pairs], draws: int = DRAWS) -> dict[str, object]:
    """Figures of all pairs together with their intervals, and the number of pairs. prompts: pairs of each."""
    per_prompt = np.array([sums(*pairs) for pairs in prompts])
    if not per_prompt[:, 0].sum():
        return {"pairs": 0}
    values, drawn = figures(per_prompt.sum(0)), figures(_resampled(len(per_prompt), draws) @ per_prompt)
    out: dict[str, object] = {name: list(_interval(float(values[name]), drawn[name])) for name in values}
    return {"pairs": int(per_prompt[:, 0].sum()), **out}


def ratio(numerators: Sequence[float], denominators: Sequence[float], draws: int = DRAWS) -> list[float]:
    """Ratio of two sums over prompts, with its interval: [value, low, high]."""
    both = np.array([numerators, denominators], np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        value = both[:, 0].sum() / both[:, 1].sum()
        drawn = _resampled(len(both), draws) @ both
        return list(_interval(float(value), drawn[:, 0] / drawn[:, 1]))


def mean(values: Sequence[float], draws: int = DRAWS) -> list[float]:
    """Mean over prompts with its interval: [value, low, high]."""
    return ratio(values, [1.0] * len(values), draws)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's correlation, ties by the mean of their ranks."""
    known = np.isfinite(x) & np.isfinite(y)
    ranks = [_ranks(np.asarray(values, np.float64)[known]) for values in (x, y)]
    if known.sum() < 3 or any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[inverse])


@cache
def _resampled(prompts: int, draws: int) -> np.ndarray:
    """Number of times that each prompt is drawn: [draws, prompts]."""
    return np.random.default_rng(SEED).multinomial(prompts, [1 / prompts] * prompts, size=draws)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(known, [TAIL, 1 - TAIL])
    return Interval(value, float(low), float(high))
