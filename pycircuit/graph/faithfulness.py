"""Faithfulness of a graph: agreement of predicted with measured effects of interventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .show.html_table import html_table

KEY = "faithfulness"  # in a graph's provenance

Measured = Literal["all", "attention", "none"]  # values of `freeze` that a validation measures
_MEANING: dict[Measured, str] = {
    "all": "direct effects, everything frozen",
    "attention": "total effects, MLPs running",
    "none": "total effects, nothing frozen",
}


@dataclass(frozen=True)
class Agreement:
    """Predicted against measured effects of sources on rows that read `distance` layers above them (None: on all).

    freeze: "all", edges against a model with frozen MLPs; "attention", edges and all paths through features against
    a model whose MLPs run while patterns and denominators are frozen; "none", the same against the model as it is.
    pairs: number of effects; lost: number of further effects that were not finite (with frozen denominators a large
    change can grow from MLP to MLP). correlation: Pearson's. error: mean of |measured - predicted| over mean of
    |measured|. explained: 1 - sum of (measured - predicted)^2 over sum of measured^2. None where undefined.
    """

    freeze: Measured
    distance: int | None
    pairs: int
    lost: int
    correlation: float | None
    error: float | None
    explained: float | None


@dataclass(frozen=True)
class Faithfulness:
    """Agreements of one validation.

    nodes: the changed nodes; kinds: their number by kind; factor: the factor on their activation.
    """

    nodes: list[int]
    kinds: dict[str, int]
    factor: float
    seed: int
    agreements: list[Agreement]

    def overall(self, freeze: Measured = "attention") -> Agreement:
        """Agreement over all distances together."""
        totals = [a for a in self.agreements if a.freeze == freeze and a.distance is None]
        if not totals:
            raise ValueError(f"overall: freeze must be one of {', '.join(_MEANING)}, got {freeze!r}")
        return totals[0]

    def as_dict(self) -> dict[str, Any]:
        """Fields as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Faithfulness:
        """Make it from the fields that `as_dict` returned."""
        agreements = [Agreement(**fields) for fields in content["agreements"]]
        return cls(**{**content, "agreements": agreements})

    def _repr_html_(self) -> str:
        rows = [
            (_MEANING[a.freeze], "all" if a.distance is None else str(a.distance), a.pairs, a.lost, a.correlation,
             a.error, a.explained)
            for a in self.agreements
        ]  # fmt: skip
        header = ("predicted against measured", "layers above", "pairs", "lost", "correlation", "error", "explained")
        return html_table(header, rows, self._changed())

    def _changed(self) -> str:
        kinds = ", ".join(f"{n} {kind}{'s' * (n != 1)}" for kind, n in self.kinds.items() if n)
        return f"{kinds}, each times {self.factor:g}"

    def __str__(self) -> str:
        lines = [self._changed()]
        for freeze, meaning in _MEANING.items():
            lines += [f"{meaning}:", "  layers above   pairs    lost  correlation    error  explained"]
            for a in self.agreements:
                if a.freeze == freeze:
                    distance = "all" if a.distance is None else str(a.distance)
                    figures = (_figure(v) for v in (a.correlation, a.error, a.explained))
                    lines.append("  {:>12} {:7} {:7}  {:>11}  {:>7}  {:>9}".format(distance, a.pairs, a.lost, *figures))
        return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
