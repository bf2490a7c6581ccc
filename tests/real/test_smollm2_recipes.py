"""Recipes that ask SmolLM2, with transcoders trained here: what their pages assert holds with a weak set too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_pages import needs_smollm2, pages, run

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [name for name in pages() if needs_smollm2(name)])
def test_recipes_run(
    name: str,
    folder: Path,
    trained: pc.PerLayerTranscoders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[[str], None],
) -> None:
    """The page loads the model from the converted folder, and the set from a folder as its reader does."""
    trained.save(tmp_path / "transcoders")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(folder.parent))
    figure(f"{name}: " + "; ".join("".join(run(name)).splitlines()))
    assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
