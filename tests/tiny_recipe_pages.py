"""Pages of recipes, run as their reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "docs/recipes"
LONGEST = 80  # lines of a page


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's code in a folder; its own assertions say what must move, and it draws its figure."""
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (RECIPES / f"{name}.md").read_text(), re.S)
    assert any("assert" in block for block in blocks)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}.md, block {number}", "exec"), names)
    assert (folder / f"{name}.svg").stat().st_size > 1000


def check_page(name: str) -> None:
    """Require that a page is short, shows its committed figure, and ends as recipes do."""
    text = (RECIPES / f"{name}.md").read_text()
    assert len(text.splitlines()) <= LONGEST
    assert f"({name}.svg)" in text and (RECIPES / f"{name}.svg").read_text().startswith("<svg")
    assert text.index("## Limits") < text.index("## On a model of your own")
