"""Recipes of docs/recipes: each runs, prints what it shows, draws its picture and says what it must."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from recipe_pages import FOLDER, differences, needs_smollm2, pages, run, shown, text, trains

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = pages()
PICTURE = re.compile(r"!\[[^\]]+\]\(([\w-]+\.svg)\)")


@pytest.mark.parametrize("name", [name for name in NAMES if not needs_smollm2(name) and not trains(name)])
def test_recipes_run_and_print_what_they_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make recipes` writes the output and the picture that a page shows."""
    monkeypatch.chdir(tmp_path)
    printed = run(name)
    assert any(printed)
    for output, page in zip(printed, shown(name), strict=True):
        assert not differences(output, page), "make recipes writes what the page prints"
    for picture in PICTURE.findall(text(name)):
        drawn = (tmp_path / picture).read_text()
        assert words(drawn) == words((FOLDER / picture).read_text()), "make recipes draws the picture anew"


def words(svg: str) -> list[str]:
    """Words of a picture, sorted; places and numbers may differ between machines."""
    return sorted(re.findall(r"[^\W\d_]+", re.sub(r"<[^>]*>", " ", svg)))


@pytest.mark.parametrize("name", NAMES)
def test_recipes_have_their_sections(name: str) -> None:
    """At most 80 lines: a question, a picture of at most 40 kB, an intervention, limits, and the reader's own model."""
    page = text(name)
    assert len(page.splitlines()) <= 80
    headings = re.findall(r"^## (.+)$", page, re.M)
    assert "Limits" in headings and headings[-1] == "On a model of your own"
    assert re.search(r"pc\.intervene|def without\(heads\)", page) and "assert " in page
    sizes = [(FOLDER / picture).stat().st_size for picture in PICTURE.findall(page)]
    assert sizes and max(sizes) < 40_000


def test_index_and_navigation_list_every_recipe() -> None:
    index, site = (FOLDER / "index.md").read_text(), (FOLDER.parents[1] / "mkdocs.yml").read_text()
    assert sorted(re.findall(r"\]\(([\w-]+)\.md\)", index)) == NAMES
    assert sorted(re.findall(r"recipes/([\w-]+)\.md", site)) == sorted([*NAMES, "index"])


def test_differences_see_words_lines_and_numbers() -> None:
    page = "Austin 98%\n0.912 of 7\n"
    assert not differences("Austin 97%\n0.913 of 7\n", page)
    assert len(differences("Denver 98%\n0.912 of 7\n", page)) == 1
    assert len(differences("Austin 90%\n0.912 of 7\n", page)) == 1
    assert differences("Austin 98%\n0.930 of 7\n", page) and differences("Austin 98%\n", page)
