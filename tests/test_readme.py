"""What the documents say is true: examples run, targets exist, paths and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pycircuit.ops.registry import OPS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
EXAMPLES = [
    pytest.param(block, id=f"{name}-{i}")
    for name in DOCUMENTS
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S))
]


def test_readme_has_an_example() -> None:
    assert any(param.id.startswith("README") for param in EXAMPLES)


@pytest.mark.parametrize("block", EXAMPLES)
def test_example_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {"__name__": "__main__"})


def test_readme_has_the_ops() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert tuple(rows) == tuple(OPS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_targets_and_links_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (ROOT / link).exists(), link
    for path in re.findall(r"`((?:csrc|kernels|pycircuit|tests|benchmarks|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
