"""Text of an automatic label: `raises Texas, Dallas, TX`, `on "capital"`, or both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .plain_tokens import columns

LONGEST = 40  # columns of a label
EVERYWHERE = "on most tokens"
_CHOICES = ((3, 1), (2, 1), (1, 1), (3, 0), (2, 0), (1, 0))  # numbers of tokens raised and active on, best first
_ACTIVE_CHOICES = ((0, 3), (0, 2), (0, 1))


def label_text(raised: Sequence[str], active: Sequence[str], everywhere: bool = False) -> str:
    """Write a label of at most LONGEST columns; "" where there is nothing to say.

    raised, active: texts of tokens, the clearest first; everywhere: the feature is active on most tokens.
    """
    if everywhere:
        active = ()
    for text in _candidates(raised, active, everywhere):
        if columns(text) <= LONGEST:
            return text
    return ""


def _candidates(raised: Sequence[str], active: Sequence[str], everywhere: bool) -> Iterator[str]:
    for raised_count, active_count in _CHOICES if raised else _ACTIVE_CHOICES:
        if active_count and not active and raised_count:
            continue
        parts = []
        if raised_count:
            parts.append("raises " + ", ".join(_listed(text) for text in raised[:raised_count]))
        if active_count and active:
            parts.append("on " + ", ".join(_quoted(text) for text in active[:active_count]))
        elif everywhere and not raised_count:
            parts.append(EVERYWHERE)
        yield " · ".join(parts)


def _quoted(text: str) -> str:
    mark = "'" if '"' in text else '"'
    return f"{mark}{text}{mark}"


def _listed(text: str) -> str:
    """A token in a list: in quotes if it could be taken for the list's own commas."""
    return text if any(c.isalnum() for c in text) and "," not in text else _quoted(text)
