"""What is changed, and what stays as it was on the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isinf
from typing import Any

from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import checks

FREEZE = ("all", "attention", "patterns", "none")


@dataclass(frozen=True)
class Intervention:
    """Give one feature another activation: `value`, or `factor` times the one it has without any intervention.

    position: a position (negative: from the end of the prompt), a slice, or None for all. Slices leave out the
    opening positions that have no features; one without an end goes on over generated tokens. value=0 ablates.
    """

    layer: int
    position: int | slice | None
    feature: int
    value: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        op = "Intervention"
        for name in ("layer", "feature"):
            object.__setattr__(self, name, checks.whole_number(op, name, getattr(self, name), 0))
        object.__setattr__(self, "position", _place(op, self.position))
        if (self.value is None) == (self.factor is None):
            got = "neither" if self.value is None else "both"
            raise ValueError(f"{op}: exactly one of value and factor must be given, got {got}")
        for name in ("value", "factor"):
            given = getattr(self, name)
            if given is not None:
                number = checks.number(op, name, given)
                if isinf(number):
                    raise ValueError(f"{op}: {name} must be finite, got {number}")
                object.__setattr__(self, name, number)

    def places(self, prompt: int, end: int) -> range:
        """Which of `end` positions are meant, the first `prompt` of which are the prompt's."""
        if isinstance(self.position, int):
            at = _from_start(self.position, prompt)
            return range(at, at + 1)
        where = self.position or slice(None)
        start = 0 if where.start is None else max(0, _from_start(where.start, prompt))
        stop = end if where.stop is None else min(end, _from_start(where.stop, prompt))
        return range(start, stop, where.step or 1)


def _from_start(position: int, prompt: int) -> int:
    return position + prompt if position < 0 else position


def _place(op: str, position: Any) -> int | slice | None:
    if position is None:
        return None
    if not isinstance(position, slice):
        return checks.whole_number(op, "position", position, -(2**63))
    parts = [position.start, position.stop, position.step]
    whole = [None if p is None else checks.whole_number(op, "position", p, -(2**63)) for p in parts]
    if whole[2] is not None and whole[2] < 1:
        raise ValueError(f"{op}: position must step forward, got a step of {whole[2]}")
    return slice(*whole)


def interventions_of(op: str, name: str, given: Any, model: ReplacementModel) -> tuple[Intervention, ...]:
    """A list of interventions whose layers and features the model has."""
    if not isinstance(given, Sequence):
        raise TypeError(f"{op}: {name} must be a list of pc.Intervention, got {type(given).__name__}")
    for one in given:
        if not isinstance(one, Intervention):
            raise TypeError(f"{op}: {name} must hold pc.Intervention, got {type(one).__name__}")
        feature_of(op, model, one.layer, one.feature)
    return tuple(given)


def feature_of(op: str, model: ReplacementModel, layer: int, feature: int) -> None:
    """Whether the model has this feature."""
    if not 0 <= layer < model.depth:
        raise ValueError(f"{op}: layer must be from 0 to {model.depth - 1}, got {layer}")
    size = model.transcoders.size(layer)
    if not size:
        raise ValueError(f"{op}: layer must have a transcoder, got {layer}, which has none")
    if not 0 <= feature < size:
        raise ValueError(f"{op}: feature must be from 0 to {size - 1} in layer {layer}, got {feature}")


def positions_of(op: str, one: Intervention, prompt: int, end: int, ignore: int) -> range:
    """The positions with features that an intervention names, and at least one."""
    places = one.places(prompt, end)
    known = f"from {ignore} to {end - 1}" + (" (earlier ones have no features)" if ignore else "")
    if isinstance(one.position, int) and not ignore <= places.start < end:
        raise ValueError(f"{op}: position must be {known}, got {one.position}")
    skipped = max(0, -(-(ignore - places.start) // places.step))
    places = places[skipped:]
    if not places:
        raise ValueError(f"{op}: position must name positions {known}, got {one.position}, which names none")
    return places


@dataclass(frozen=True)
class Hold:
    """What keeps the value it had on the prompt. layers: where MLPs do, the changes apart."""

    freeze: str
    layers: range
    depth: int

    @classmethod
    def of(cls, op: str, freeze: Any, layers: Any, depth: int) -> Hold:
        if freeze not in FREEZE:
            raise ValueError(f"{op}: freeze must be one of {', '.join(FREEZE)}, got {freeze!r}")
        if layers is None:
            return cls(freeze, range(depth if freeze == "all" else 0), depth)
        if not isinstance(layers, range):
            raise TypeError(f"{op}: layers must be a range or None, got {type(layers).__name__}; range(first, end)")
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= depth:
            raise ValueError(f"{op}: layers must be within the model's, range(0, {depth}), got {layers}")
        if freeze == "all" and len(layers) < depth:
            raise ValueError(f"{op}: layers must be None or all of them with freeze='all', got {layers}")
        return cls(freeze, layers, depth)

    @property
    def written(self) -> range:
        """The layers that changes are written to."""
        return self.layers or range(self.depth)

    def patterns(self, layer: int) -> bool:
        return self.freeze != "none" or layer in self.layers

    def norms(self, layer: int) -> bool:
        """The final norm counts as one layer more."""
        return self.freeze in ("all", "attention") or (self.freeze == "none" and layer in self.layers)
