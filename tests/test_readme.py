"""What the documents say is true: examples run, targets exist, paths and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pycircuit.ops.registry import OPS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
EXAMPLES = {
    name: blocks
    for name in DOCUMENTS
    if (blocks := re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S))
}


def test_readme_has_an_example() -> None:
    assert "README.md" in EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page one after another, as its reader would."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(EXAMPLES[name]):
        exec(compile(block, f"{name}, block {number}", "exec"), names)


def test_readme_has_the_ops() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert tuple(rows) == tuple(OPS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_targets_and_links_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (ROOT / name).parent.joinpath(link).exists(), link
    for path in re.findall(r"`((?:csrc|kernels|pycircuit|tests|benchmarks|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
