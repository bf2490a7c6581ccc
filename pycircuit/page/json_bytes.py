"""JSON of answers."""

from __future__ import annotations

import json
from typing import Any


def encoded(content: Any) -> bytes:
    """Return JSON in as few bytes as possible; a NaN is an error."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "replace")
