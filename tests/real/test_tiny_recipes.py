"""Recipes whose tiny models take longer to train than `make test` has time for."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_recipe_pages import check_page, run_page

PAGES = ("addition", "explanation", "rhyme")


@pytest.mark.usefixtures("one_thread", "own_cache")
@pytest.mark.parametrize("name", PAGES)
def test_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(name, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", PAGES)
def test_recipe_is_a_page_with_its_figure(name: str) -> None:
    check_page(name)
