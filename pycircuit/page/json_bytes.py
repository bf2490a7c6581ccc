"""JSON of answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Download:
    """A file of JSON for the browser to keep."""

    content: bytes
    name: str


def encoded(content: Any) -> bytes:
    """Return JSON in as few bytes as possible; a NaN is an error."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "replace")
