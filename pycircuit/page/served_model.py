"""The model that the server traces and changes, with its name on the page."""

from __future__ import annotations

from dataclasses import dataclass

from pycircuit.model import ReplacementModel


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model and its name."""

    model: ReplacementModel
    name: str
