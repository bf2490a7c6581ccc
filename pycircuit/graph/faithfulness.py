"""How well a graph foretells what its model does when a node is changed: figures only, of pycircuit.interventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

KEY = "faithfulness"  # in a graph's provenance

_MEANING = {
    "all": "direct effects, everything held",
    "attention": "whole effects, MLPs running",
    "none": "whole effects, nothing held",
}


@dataclass(frozen=True)
class Agreement:
    """Foretold against measured effects of sources on rows that read `distance` layers above them (None: on all).

    freeze: "all", edges against a model whose MLPs are held; "attention", edges and all paths through features against
    one whose MLPs run while patterns and denominators are held; "none", the same against the model as it is.
    pairs: how many effects; lost: how many more were not finite (with denominators held a large change can grow from
    MLP to MLP). correlation: Pearson's. error: mean of |measured - foretold| over mean of |measured|. explained: 1 -
    sum of (measured - foretold)^2 over sum of measured^2. None where undefined.
    """

    freeze: str
    distance: int | None
    pairs: int
    lost: int
    correlation: float | None
    error: float | None
    explained: float | None


@dataclass(frozen=True)
class Faithfulness:
    """nodes: which nodes were changed; kinds: how many of each; factor: what their activation was multiplied by."""

    nodes: list[int]
    kinds: dict[str, int]
    factor: float
    seed: int
    agreements: list[Agreement]

    def overall(self, freeze: str = "attention") -> Agreement:
        """All distances together."""
        found = [a for a in self.agreements if a.freeze == freeze and a.distance is None]
        if not found:
            raise ValueError(f"overall: freeze must be one of {', '.join(_MEANING)}, got {freeze!r}")
        return found[0]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Faithfulness:
        """What `as_dict` gave."""
        return cls(**{**given, "agreements": [Agreement(**one) for one in given["agreements"]]})

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}{'s' * (n != 1)}" for kind, n in self.kinds.items() if n)
        lines = [f"{kinds}, each times {self.factor:g}"]
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
