"""A curve through the measures of a run so far, and what it says of the next hour: an extrapolation, no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 4  # evaluations that a curve of three numbers is fitted to
_POWERS = np.linspace(0.05, 2.0, 40)


@dataclass(frozen=True)
class Curve:
    """limit - scale * tokens^-power, fitted to `count` evaluations; error: root of the mean squared difference."""

    limit: float
    scale: float
    power: float
    count: int
    error: float

    def value(self, tokens: float) -> float:
        """Measure that the curve has after this number of tokens."""
        return self.limit - self.scale / float(tokens**self.power)


def fit(tokens: Sequence[float], measured: Sequence[float]) -> Curve | None:
    """Fit a curve that rises to at most 1, by least squares; None for fewer than LEAST evaluations or if none rises."""
    if len(tokens) < LEAST:
        return None
    y = np.asarray(measured, dtype=float)
    curves = []
    for power in _POWERS:
        x = np.asarray(tokens, dtype=float) ** -power
        slope, limit = np.polyfit(x, y, 1)
        if limit > 1:  # no share exceeds 1: the best line through (0, 1) in its place
            limit, slope = 1.0, float((x * (y - 1)).sum() / (x * x).sum())
        if slope < 0:
            error = float(np.sqrt(np.mean((limit + slope * x - y) ** 2)))
            curves.append(Curve(float(limit), float(-slope), float(power), len(y), error))
    return min(curves, key=lambda curve: curve.error, default=None)


def outlook(tokens: Sequence[int], measured: Sequence[float], rate: float | None, name: str) -> str | None:
    """Sentence on what an hour more would bring by a fitted curve; None where there is none or the rate is unknown.

    rate: tokens a second. The gain of the curve is added to the last measure.
    """
    curve = fit(tokens, measured)
    if curve is None or not rate:
        return None
    hour = 3600 * rate
    gain = curve.value(tokens[-1] + hour) - curve.value(tokens[-1])
    return (
        f"an hour more ({hour:,.0f} tokens at the present {rate:.0f} a second) would bring {name} from "
        f"{measured[-1]:.3f} to about {min(1.0, measured[-1] + gain):.3f}, extrapolated by the fitted curve "
        f"{curve.limit:.3f} - {curve.scale:.3g} * tokens^-{curve.power:.2f} ({curve.count} evaluations, "
        f"off by {curve.error:.4f})"
    )
