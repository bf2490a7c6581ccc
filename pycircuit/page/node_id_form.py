"""The form of a node's identifier: 0/7/347, error/3/2, token/4, target/0."""

from __future__ import annotations

import re

FORM = "LAYER/POSITION/FEATURE, error/LAYER/POSITION, token/POSITION or target/N"
_NUMBER = r"(?:0|[1-9]\d{0,8})"
_FORMS = re.compile(rf"{_NUMBER}/{_NUMBER}/{_NUMBER}|error/{_NUMBER}/{_NUMBER}|(?:token|target)/{_NUMBER}", re.ASCII)


def is_node_id(text: object) -> bool:
    """Return True for an identifier in the right form, whether a graph has the node or not."""
    return isinstance(text, str) and _FORMS.fullmatch(text) is not None
