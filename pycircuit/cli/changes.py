"""Interventions as they are written on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated

import typer

import pycircuit as pc

Spot = tuple[int, int | slice | None, int]  # layer, position (None: all), feature
_SPOT = re.compile(r"(\d+)/(\*|-?\d+|-?\d*:-?\d*)/(\d+)")
_NUMBERS = re.compile(r"[\d/*:,.\- ]*")  # meant as a spot, whatever is wrong with it
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
    """where: a spot, or the label of features that are changed at every position. Value or factor is None."""

    option: str
    where: Spot | str
    value: float | None = None
    factor: float | None = None

    def on(self, model: pc.ReplacementModel) -> list[pc.Intervention]:
        if not isinstance(self.where, str):
            return [pc.Intervention(*self.where, self.value, self.factor)]
        found = [place for place, label in model.labels.items() if label == self.where]
        if not found:
            near = get_close_matches(self.where, set(model.labels.values()), 3)
            known = f"; there is {', '.join(near)}" if near else ""
            raise ValueError(f"{self.option} must be {_FORM}, or a label of the model's, got {self.where!r}{known}")
        return [pc.Intervention(layer, None, feature, self.value, self.factor) for layer, feature in sorted(found)]


@dataclass(frozen=True)
class Steering:
    """What is changed."""

    setting: Setting = None
    scaling: Scaling = None
    ablation: Ablation = None

    def changes(self) -> list[Change]:
        """In the order set, scale, ablate."""
        found = []
        for given in self.setting or ():
            where, value = _equal("--set", given)
            found.append(Change("--set", where, value=value))
        for given in self.scaling or ():
            where, factor = _equal("--scale", given)
            found.append(Change("--scale", where, factor=factor))
        return found + [Change("--ablate", _where("--ablate", given), value=0.0) for given in self.ablation or ()]


def _equal(option: str, given: str) -> tuple[Spot | str, float]:
    where, _, number = given.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        where = ""
    if not where:
        raise ValueError(f"{option} must be LAYER/POSITION/FEATURE=NUMBER or LABEL=NUMBER, got {given!r}")
    return _where(option, where), value


def _where(option: str, given: str) -> Spot | str:
    return spot(option, given) if _NUMBERS.fullmatch(given) else given


def spot(option: str, given: str) -> Spot:
    """3/5/412, or with * or a slice for the position."""
    found = _SPOT.fullmatch(given)
    if found is None:
        raise ValueError(f"{option} must be {_FORM}, got {given!r}")
    layer, position, feature = found.groups()
    if position == "*":
        return int(layer), None, int(feature)
    ends = [int(end) if end else None for end in position.split(":")]
    return int(layer), slice(*ends) if ":" in position else int(position), int(feature)
