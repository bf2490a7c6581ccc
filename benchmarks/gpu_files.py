"""What the sections of `make gpu` share: names and seconds, and how results are written. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 440  # seconds of a run, the install included: seven and a half minutes with its start and its end
SECONDS = {
    "compile": 40,  # beside the install
    "card": 14,
    "plt": 62,
    "tests": 46,
    "clt": 36,
    "long": 132,
    "taped": 48,
    "ops": 28,
    "tune": 34,
}  # they add up to TOTAL; what a section leaves, the next ones have


def write_json(path: Path, content: Any) -> None:
    """Replace a file by this content, all of it or nothing."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(draft, path)


def reason(error: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def attempt(call: Callable[[], Any]) -> Any:
    """The call's result, or why there is none: a benchmark goes on, and its report says so."""
    try:
        return call()
    except Exception as error:
        return {"unavailable": reason(error)}


@dataclass
class Section:
    """Where a section runs, until when, and its results so far; whatever it saves is in its file at once.

    device: "cuda" or "cpu", a dry run at tiny shapes; deadline: on the monotonic clock; results: a folder for files
    beside the report; tests: the folder of tests that are run.
    """

    device: str
    deadline: float
    path: Path
    results: Path
    tests: Path = ROOT / "tests"
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self, name: str, value: Any) -> None:
        self.content[name] = value
        write_json(self.path, self.content)

    def mark(self, why: str) -> None:
        """Save why this section is red; it goes on."""
        self.save("red", [*self.content.get("red", []), why])

    def skip(self, name: str, needed: float) -> bool:
        """Save that there is no time for something, if that is so."""
        late = self.left() < needed
        if late:
            self.save(name, {"skipped": f"needs about {needed:.0f} s, {max(self.left(), 0):.0f} s are left"})
        return late
