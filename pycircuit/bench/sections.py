"""Sections of RESULTS.md: each writer replaces its own."""

from __future__ import annotations

import re
from pathlib import Path

ORDER = ("ops", "trace", "growth", "train", "lazy", "peers", "gpu")
_SECTION = re.compile(r"<!-- begin (\w+) -->\n(.*?)<!-- end \1 -->\n", re.DOTALL)


def read(path: Path) -> dict[str, str]:
    """Sections by name; a file without marks has only the section of the ops."""
    text = path.read_text() if path.exists() else ""
    sections = dict(_SECTION.findall(text))
    return sections if sections or not text else {ORDER[0]: text}


def put(path: Path, name: str, text: str) -> None:
    """Write `text` as the section `name`."""
    if name not in ORDER:
        raise ValueError(f"bench: section must be one of {', '.join(ORDER)}, got {name!r}")
    sections = read(path) | {name: text.rstrip("\n") + "\n"}
    blocks = [f"<!-- begin {n} -->\n{sections[n]}<!-- end {n} -->\n" for n in ORDER if n in sections]
    path.write_text("\n".join(blocks))
