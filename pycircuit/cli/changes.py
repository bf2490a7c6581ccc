"""Interventions in the notation of the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated

import typer

import pycircuit as pc

Location = tuple[int, int | slice | None, int]  # layer, position (None: all), feature
_LOCATION = re.compile(r"(\d+)/(\*|-?\d+|-?\d*:-?\d*)/(\d+)")
_NUMBERS = re.compile(r"[\d/*:,.\- ]*")  # a location, right or wrong, and no label
_FORM = "LAYER/POSITION/FEATURE such as 3/5/412, 3/*/412 or 3/5:/412"

Setting = Annotated[
    list[str] | None,
    typer.Option("--set", help="LAYER/POSITION/FEATURE=VALUE, or LABEL=VALUE. Position: 3, -1, 5:, 2:7 or *."),
]
Scaling = Annotated[
    list[str] | None, typer.Option("--scale", help="LAYER/POSITION/FEATURE=FACTOR, or LABEL=FACTOR: times a factor.")
]
Ablation = Annotated[
    list[str] | None, typer.Option("--ablate", help="LAYER/POSITION/FEATURE, or LABEL: it becomes zero.")
]


@dataclass(frozen=True)
class Change:
    """A change of one option: by value or by factor, the other is None.

    where: a location, or the label of features that are changed at every position.
    """

    option: str
    where: Location | str
    value: float | None = None
    factor: float | None = None

    def interventions(self, model: pc.ReplacementModel) -> list[pc.Intervention]:
        """Interventions on the model's features."""
        if not isinstance(self.where, str):
            return [pc.Intervention(*self.where, self.value, self.factor)]
        labelled = [feature for feature, label in model.labels.items() if label == self.where]
        if not labelled:
            near = get_close_matches(self.where, set(model.labels.values()), 3)
            advice = f"; there is {', '.join(near)}" if near else ""
            raise ValueError(f"{self.option} must be {_FORM}, or a label of the model's, got {self.where!r}{advice}")
        return [pc.Intervention(layer, None, feature, self.value, self.factor) for layer, feature in sorted(labelled)]


@dataclass(frozen=True)
class Steering:
    """Changes of features: options of `intervene` and `generate`."""

    setting: Setting = None
    scaling: Scaling = None
    ablation: Ablation = None

    def changes(self) -> list[Change]:
        """Parse the options, in the order set, scale, ablate."""
        changes = []
        for text in self.setting or ():
            where, value = _parse_assignment("--set", text)
            changes.append(Change("--set", where, value=value))
        for text in self.scaling or ():
            where, factor = _parse_assignment("--scale", text)
            changes.append(Change("--scale", where, factor=factor))
        return changes + [Change("--ablate", _parse_where("--ablate", text), value=0.0) for text in self.ablation or ()]


def _parse_assignment(option: str, text: str) -> tuple[Location | str, float]:
    """Parse LOCATION=NUMBER or LABEL=NUMBER."""
    where, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        where = ""
    if not where:
        raise ValueError(f"{option} must be LAYER/POSITION/FEATURE=NUMBER or LABEL=NUMBER, got {text!r}")
    return _parse_where(option, where), value


def _parse_where(option: str, text: str) -> Location | str:
    """Parse a location or a label."""
    return parse_location(option, text) if _NUMBERS.fullmatch(text) else text


def parse_location(option: str, text: str) -> Location:
    """Parse 3/5/412, or with * or a slice for the position."""
    match = _LOCATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{option} must be {_FORM}, got {text!r}")
    layer, position, feature = match.groups()
    if position == "*":
        return int(layer), None, int(feature)
    ends = [int(end) if end else None for end in position.split(":")]
    return int(layer), slice(*ends) if ":" in position else int(position), int(feature)
