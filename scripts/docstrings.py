"""Docstrings as Markdown, for the API page (mkdocs.yml names this file).

Docstrings are plain text: brackets, stars and underscores mean themselves, and a line `name: ...` begins a new line.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"\n(?=[a-z][\w, ]*: )")


def markdown(docstring: str) -> str:
    """Markdown that shows a docstring as it is written; what stands between backticks stays code."""
    texts = re.split(r"(`[^`]*`)", docstring)
    texts[::2] = [re.sub(r"([\\\[\]*_<])", r"\\\1", text) for text in texts[::2]]
    return ARGUMENT.sub("\n\n", "".join(texts))


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring as it is collected."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
