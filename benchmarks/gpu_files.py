"""Names, seconds and results of the sections of `make gpu`. Imports no torch."""

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
    "compile": 46,  # beside the install
    "card": 14,
    "plt": 62,
    "tests": 60,
    "clt": 30,
    "long": 120,
    "taped": 46,
    "ops": 28,
    "tune": 34,
}  # they add up to TOTAL; time that a section leaves goes to the next ones


def write_json(path: Path, content: Any) -> None:
    """Replace a file by this content, atomically."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(draft, path)


def reason(error: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def attempt(call: Callable[[], Any]) -> Any:
    """Result of the call, or the reason why it failed, so that a benchmark goes on and reports it."""
    try:
        return call()
    except Exception as error:
        return {"unavailable": reason(error)}


@dataclass
class Section:
    """Device, deadline and results of a section; every saved result is written to its file at once.

    device: "cuda" or "cpu", a dry run at tiny shapes; deadline: on the monotonic clock; results: a folder for files
    beside the report; tests: the folder of tests to run.
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
        """Tell if too little time is left for `name`, and save that."""
        late = self.left() < needed
        if late:
            self.save(name, {"skipped": f"needs about {needed:.0f} s, {max(self.left(), 0):.0f} s are left"})
        return late
