"""One change of a feature, and the parts of the model that stay frozen while it acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isinf
from typing import Any, Literal, get_args

import torch

from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import checks

Freeze = Literal["all", "attention", "patterns", "none"]
FREEZE: tuple[Freeze, ...] = get_args(Freeze)


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
        object.__setattr__(self, "position", _checked_position(op, self.position))
        if (self.value is None) == (self.factor is None):
            got = "neither" if self.value is None else "both"
            raise ValueError(f"{op}: exactly one of value and factor must be given, got {got}")
        for name in ("value", "factor"):
            number = getattr(self, name)
            if number is not None:
                number = checks.number(op, name, number)
                if isinf(number):
                    raise ValueError(f"{op}: {name} must be finite, got {number}")
                object.__setattr__(self, name, number)

    def positions(self, prompt: int, end: int) -> range:
        """The positions that are meant among `end`, the first `prompt` of which are the prompt's."""
        if isinstance(self.position, int):
            position = _from_start(self.position, prompt)
            return range(position, position + 1)
        bounds = self.position or slice(None)
        start = 0 if bounds.start is None else max(0, _from_start(bounds.start, prompt))
        stop = end if bounds.stop is None else min(end, _from_start(bounds.stop, prompt))
        return range(start, stop, bounds.step or 1)


def _from_start(position: int, prompt: int) -> int:
    return position + prompt if position < 0 else position


def _checked_position(op: str, position: Any) -> int | slice | None:
    if position is None:
        return None
    if not isinstance(position, slice):
        return checks.whole_number(op, "position", position, -(2**63))
    bounds = [position.start, position.stop, position.step]
    start, stop, step = (None if b is None else checks.whole_number(op, "position", b, -(2**63)) for b in bounds)
    if step is not None and step < 1:
        raise ValueError(f"{op}: position must step forward, got a step of {step}")
    return slice(start, stop, step)


def checked_interventions(
    op: str, name: str, interventions: Sequence[Intervention], model: ReplacementModel
) -> tuple[Intervention, ...]:
    """Interventions whose layers and features the model has."""
    if not isinstance(interventions, Sequence):
        raise TypeError(f"{op}: {name} must be a list of pc.Intervention, got {type(interventions).__name__}")
    for intervention in interventions:
        if not isinstance(intervention, Intervention):
            raise TypeError(f"{op}: {name} must hold pc.Intervention, got {type(intervention).__name__}")
        require_feature(op, model, intervention.layer, intervention.feature)
        _require_range(op, model, intervention)
    return tuple(interventions)


def _require_range(op: str, model: ReplacementModel, intervention: Intervention) -> None:
    """Raise if a value or factor is infinite in the type that the model computes in."""
    largest = torch.finfo(model.dtype).max
    for name in ("value", "factor"):
        number = getattr(intervention, name)
        if number is not None and abs(number) > largest:
            dtype = str(model.dtype).removeprefix("torch.")
            raise ValueError(f"{op}: {name} must be at most {largest:g} in size in {dtype}, got {number:g}; lower it")


def require_feature(op: str, model: ReplacementModel, layer: int, feature: int) -> None:
    """Raise unless the model has this feature."""
    if not 0 <= layer < model.depth:
        raise ValueError(f"{op}: layer must be from 0 to {model.depth - 1}, got {layer}")
    size = model.transcoders.size(layer)
    if not size:
        raise ValueError(f"{op}: layer must have a transcoder, got {layer}, which has none")
    if not 0 <= feature < size:
        raise ValueError(f"{op}: feature must be from 0 to {size - 1} in layer {layer}, got {feature}")


def checked_positions(op: str, intervention: Intervention, prompt: int, end: int, ignore: int) -> range:
    """The positions with features that an intervention means, at least one."""
    positions = intervention.positions(prompt, end)
    allowed = f"from {ignore} to {end - 1}" + (" (earlier ones have no features)" if ignore else "")
    if isinstance(intervention.position, int) and not ignore <= positions.start < end:
        raise ValueError(f"{op}: position must be {allowed}, got {intervention.position}")
    ignored = max(0, -(-(ignore - positions.start) // positions.step))
    positions = positions[ignored:]
    if not positions:
        raise ValueError(f"{op}: position must name positions {allowed}, got {intervention.position}, which names none")
    return positions


@dataclass(frozen=True)
class Frozen:
    """The values that stay as they were on the prompt.

    layers: those whose MLP outputs do, the changes apart.
    """

    freeze: Freeze
    layers: range
    depth: int

    @classmethod
    def checked(cls, op: str, freeze: Freeze, layers: range | None, depth: int) -> Frozen:
        """Return what `freeze` and `layers` of a call say, or raise where they cannot be met."""
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

    def has_pattern(self, layer: int) -> bool:
        """True where a layer's attention patterns are frozen."""
        return self.freeze != "none" or layer in self.layers

    def has_norms(self, layer: int) -> bool:
        """True where a layer's norm denominators are frozen; the final norm counts as one layer more."""
        return self.freeze in ("all", "attention") or (self.freeze == "none" and layer in self.layers)
