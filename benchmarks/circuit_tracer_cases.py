"""Cases of the comparison with circuit-tracer, and the test that two of them agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pycircuit.bench import whole_trace
from pycircuit.bench.shapes import SHAPES, Shape
from pycircuit.bench.whole_trace import Traced

CIRCUIT_TRACER, DROP_IN = "circuit-tracer", "drop-in"
FAST = "float32-fast"  # pycircuit by its native ops at this precision, where the processor multiplies bfloat16
INTERVAL = 4  # circuit-tracer's update_interval
ROW = 1e-4  # largest distance of a row, over its norm
COMMON = 0.99  # least share of the features chosen, and of those active: float32 decides ties
TINY = Shape("tiny", 3, 64, 4, 4, 16, 256, 8, 32, 48, "cpu")


@dataclass(frozen=True)
class Plan:
    """Cases of one shape and their targets.

    batches: circuit-tracer's batch sizes, its best first; least: ratio of its time to ours at each batch; drop_in:
    ratio of its own `attribute` to ours on its own model, at its best batch; fast: of its time to ours at FAST.
    """

    shape: Shape
    batches: tuple[int, ...]
    least: tuple[float, ...] = ()
    reference: float | None = None
    rate: float | None = None
    memory: float | None = None
    phase: float | None = None
    drop_in: float | None = None
    fast: float | None = None


PLANS = {
    plan.shape.name: plan
    for plan in (
        Plan(TINY, (4, 256), drop_in=0, fast=0),
        Plan(SHAPES["small"], (16, 256), (5, 20), reference=2, rate=0.45, phase=0.2, drop_in=5, fast=20),
        Plan(SHAPES["medium"], (32,), (8,), reference=2, rate=0.5, fast=25),
        Plan(SHAPES["long"], (8,), (10,), memory=0.25, fast=15),
        Plan(SHAPES["long4k"], ()),
    )
}


@dataclass(frozen=True)
class Case:
    """One run: circuit-tracer, the drop-in, or pycircuit by one implementation.

    batch: circuit-tracer's batch size; our rounds are its batches between two refreshes. 0: pycircuit alone, as users
    run it.
    """

    shape: str
    what: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.shape}/{self.what}" + (f"/batch {self.batch}" if self.batch else "")

    @property
    def round_size(self) -> int | None:
        return INTERVAL * self.batch if self.batch else None


def _keys(features: np.ndarray) -> np.ndarray:
    """One number for each (layer, position, feature): [n]."""
    layer, position, feature = features.astype(np.int64).T
    return (layer << 48) | (position << 32) | feature


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Shares of active and of chosen features in common, and the largest distance of common rows over the norm.

    A row's columns are the features chosen by both, all errors and all tokens.
    """
    active = [_keys(x["active"]) for x in (ours, theirs)]
    chosen = [_keys(x["selected"]) for x in (ours, theirs)]
    both, ours_at, their_at = np.intersect1d(*chosen, return_indices=True)
    rows = []
    for x, places in ((ours, ours_at), (theirs, their_at)):
        count = len(x["selected"])
        selected = x["rows"][np.r_[places, count : len(x["rows"])]]
        rows.append(selected[:, np.r_[places, count : selected.shape[1]]].astype(np.float64))
    norm = np.linalg.norm(rows[1], axis=1)
    if rows[0].shape != rows[1].shape or not (norm > 0).all():
        raise ValueError(f"peers: rows must have the same shape, got {rows[0].shape} and {rows[1].shape}")
    return {
        "active": len(np.intersect1d(*active)) / max(map(len, active)),
        "chosen": len(both) / max(map(len, chosen)),
        "rows": float((np.linalg.norm(rows[0] - rows[1], axis=1) / norm).max()),
    }


def agrees(shares: dict[str, float]) -> bool:
    return shares["active"] >= COMMON and shares["chosen"] >= COMMON and shares["rows"] <= ROW


@dataclass
class Compared:
    """Measured cases of one shape by name, their agreements with another case, and the verdicts on targets."""

    plan: Plan
    cases: dict[str, Traced]
    agreements: dict[str, dict[str, float]]
    verdicts: list[str]

    @property
    def right(self) -> bool:
        certified = all(t.certificate is None or t.certificate < whole_trace.LAW for t in self.cases.values())
        return certified and all(map(agrees, self.agreements.values()))
