"""Options of a trace, checked as far as they can be before the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import checks

from .precision import Arithmetic, Precision, arithmetic_of
from .targets import TargetList, positions_of

DEFAULT_FEATURES = 4096  # that get a row where max_features is not given

MaxFeatures: TypeAlias = int | Literal["all"] | None


@dataclass(frozen=True, eq=False)
class TraceOptions:
    """Options of a trace, named as in `attribute`.

    max_features: None for all; chosen: False while it is the default, which a trace lowers to what time and memory
    allow; arithmetic: of the precision, on the model's device.
    """

    targets: TargetList
    max_features: int | None
    chosen: bool
    position: int | Sequence[int]
    probability: float
    max_targets: int
    arithmetic: Arithmetic
    round_size: int | None

    @classmethod
    def checked(
        cls,
        op: str,
        model: ReplacementModel,
        targets: TargetList,
        max_features: MaxFeatures,
        position: int | Sequence[int],
        probability: float,
        max_targets: int,
        precision: Precision,
        round_size: int | None,
    ) -> TraceOptions:
        """Check the options of the function `op`, which errors name, and return them with their numbers as plain ints.

        Targets and positions are checked where the prompt is known.
        """
        arithmetic = arithmetic_of(op, precision, model.device, model.dtype)
        chosen = max_features is not None
        limit = feature_limit(op, max_features)
        round_size = _count(op, "round_size", round_size, 1)
        if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 < probability <= 1:
            raise ValueError(f"{op}: probability must be above 0 and at most 1, got {probability}")
        if not checks.is_int(max_targets) or max_targets < 1:
            raise ValueError(f"{op}: max_targets must be an int of at least 1, got {max_targets!r}")
        return cls(targets, limit, chosen, position, probability, int(max_targets), arithmetic, round_size)

    def limited(self, max_features: int) -> TraceOptions:
        """These options with at most so many features."""
        return replace(self, max_features=max_features)

    def positions(self, count: int) -> list[int]:
        """Return the positions of a prompt of `count` tokens at which outputs are read, from 0 on."""
        return positions_of(self.position, count)

    def max_outputs(self, count: int) -> int:
        """Return the number of targets on a prompt of `count` tokens, at the most."""
        at_position = len(self.targets) if isinstance(self.targets, Sequence) else self.max_targets
        return len(self.positions(count)) * at_position

    def expanded(self, active: int) -> int:
        """Return how many of the active features get a row."""
        return active if self.max_features is None else min(self.max_features, active)


def feature_limit(op: str, max_features: MaxFeatures) -> int | None:
    """Return the most features that get a row: None for "all", DEFAULT_FEATURES for None."""
    if max_features is None:
        return DEFAULT_FEATURES
    if isinstance(max_features, str):
        if max_features != "all":
            raise ValueError(f"{op}: max_features must be an int, 'all' or None, got {max_features!r}")
        return None
    return _count(op, "max_features", max_features, 0, "an int, 'all' or None")


def _count(op: str, name: str, value: int | None, minimum: int, kinds: str = "an int or None") -> int | None:
    if value is None:
        return None
    if not checks.is_int(value):
        raise TypeError(f"{op}: {name} must be {kinds}, got {type(value).__name__}")
    if value < minimum:
        rule = "not be negative" if not minimum else f"be at least {minimum}"
        raise ValueError(f"{op}: {name} must {rule}, got {value}")
    return int(value)
