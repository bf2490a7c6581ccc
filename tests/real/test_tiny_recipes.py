"""Recipes that train a tiny model: what their pages assert holds on any processor; figures are printed at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_pages import pages, run, trains


@pytest.mark.usefixtures("one_thread", "own_cache")
@pytest.mark.parametrize("name", [name for name in pages() if trains(name)])
def test_recipes_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]) -> None:
    monkeypatch.chdir(tmp_path)
    figure(f"{name}: " + "; ".join("".join(run(name)).splitlines()))
    assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
