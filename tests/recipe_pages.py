"""Pages of docs/recipes: their code, what it prints, and their pictures.

`python tests/recipe_pages.py [names]` runs pages and writes what they print and draw into docs/recipes; without names
all but those of SmolLM2, which need a folder `transcoders` where it runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "recipes"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.S)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def pages() -> list[str]:
    """Names of the recipes, in the order of the alphabet."""
    return sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "index")


def text(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def needs_smollm2(name: str) -> bool:
    return 'pc.load("smollm2"' in text(name)


def trains(name: str) -> bool:
    """Return True for a page that trains a model of its own, whose figures differ between processors."""
    return "tiny_models" in text(name)


def shown(name: str) -> list[str]:
    """Output that a page shows below each of its blocks, "" where it shows none."""
    return [output for _, output in BLOCK.findall(text(name))]


def run(name: str) -> list[str]:
    """Run the blocks of a page one after another in the current folder; return what each prints."""
    names: dict[str, object] = {"__name__": "__main__"}
    printed = []
    for number, (code, _) in enumerate(BLOCK.findall(text(name))):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, f"docs/recipes/{name}.md, block {number}", "exec"), names)
        printed.append("".join(f"{line.rstrip()}\n" for line in output.getvalue().splitlines()))
    return printed


def differences(printed: str, page: str, tolerance: float = 2.0) -> list[str]:
    """Lines in which two outputs differ: in words, or in numbers by more than `tolerance` units of the last digit."""
    ours, theirs = printed.splitlines(), page.splitlines()
    if len(ours) != len(theirs):
        return [f"{len(ours)} lines, {len(theirs)} on the page"]
    return [
        f"{line!r}, {other!r} on the page"
        for line, other in zip(ours, theirs, strict=True)
        if " ".join(NUMBER.sub("#", line).split()) != " ".join(NUMBER.sub("#", other).split())
        or not all(_near(n, m, tolerance) for n, m in zip(NUMBER.findall(line), NUMBER.findall(other), strict=True))
    ]


def _near(number: str, other: str, tolerance: float) -> bool:
    digits = max(len(n.partition(".")[2]) for n in (number, other))
    return abs(float(number) - float(other)) <= tolerance * 10.0**-digits + 1e-9


def write(name: str) -> None:
    """Run a page in docs/recipes, where its pictures then are, and write what it prints below its blocks."""
    outputs = iter(run(name))

    def with_output(block: re.Match[str]) -> str:
        output = next(outputs)
        return f"```python\n{block[1]}```\n" + (f"\n```text\n{output}```\n" if output else "")

    (FOLDER / f"{name}.md").write_text(BLOCK.sub(with_output, text(name)), encoding="utf-8")


def main() -> None:
    chosen = sys.argv[1:] or [name for name in pages() if not needs_smollm2(name)]
    transcoders = Path("transcoders").resolve()
    os.chdir(FOLDER)
    for name in chosen:
        print(name, flush=True)
        link = needs_smollm2(name) and not Path("transcoders").exists()
        if link:
            os.symlink(transcoders, "transcoders")
        try:
            write(name)
        finally:
            if link:
                os.unlink("transcoders")


if __name__ == "__main__":
    main()
