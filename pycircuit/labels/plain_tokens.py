"""Tokens as a person reads them, whatever the tokenizer and the language."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from unicodedata import category, combining, east_asian_width

LONGEST = 16  # columns of a token
_WORD_STARTS = ("Ġ", "▁")  # how byte-level and SentencePiece tokenizers write a leading space
_SPACES = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SAMPLE = 512  # tokens looked at to see if a tokenizer marks the beginnings of words


def columns(text: str) -> int:
    """Count the columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, limit: int = LONGEST) -> str:
    """Shorten a text to `limit` columns, with an ellipsis if it was longer."""
    if columns(text) <= limit:
        return text
    while columns(text) >= limit:
        text = text[:-1]
    return f"{text}…"


def plain(text: str) -> str:
    """Make a text legible on one line: spaces around words go, other spaces and what cannot be seen are shown."""
    words = text.strip(" ")
    if not words or words.isspace():
        return _blank(text)
    shown = "".join(_SPACES.get(c, c) if c.isprintable() or c in _SPACES else f"<U+{ord(c):04X}>" for c in words)
    shown = shown.replace("␣", " ")
    return f"◌{shown}" if category(shown[0]).startswith("M") else shown  # an accent needs a letter to sit on


def _blank(text: str) -> str:
    """Show a text of spaces: ␣, ⏎, ␣×4."""
    runs = re.finditer(r"(.)\1*", text, re.DOTALL)
    shown = [(_SPACES.get(run[1], f"<U+{ord(run[1]):04X}>"), len(run[0])) for run in runs]
    return "".join(mark if count == 1 else f"{mark}×{count}" for mark, count in shown)


def _byte_table() -> dict[str, int]:
    """Bytes by the characters that byte-level tokenizers write for them: printable ones are their own."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


class PlainTokens:
    """Legible text of a token by its id; without a tokenizer the id itself.

    A token that goes on in the middle of a word is `-ing`, where the tokenizer marks the beginnings of words; bytes
    that are no character alone are `<E2 80>`.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self._bytes = _byte_table()
        self._texts: dict[int, str] = {}
        sample = min(_SAMPLE, vocabulary)
        self._marked = tokenizer is not None and any(self._begins_word(token) for token in range(sample))

    def __call__(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = shorten(self._text(token))
        return self._texts[token]

    def distinct(self, tokens: Sequence[int], count: int) -> list[str]:
        """Texts of the first `count` tokens that differ in more than case and spaces."""
        texts: dict[str, str] = {}
        for token in tokens:
            if len(texts) == count:
                break
            text = self(token)
            if text:
                texts.setdefault(self.folded(text), text)
        return list(texts.values())

    @staticmethod
    def folded(text: str) -> str:
        """Form that texts share which differ in no more than case and spaces."""
        return text.removeprefix("-").casefold()

    def _text(self, token: int) -> str:
        if self.tokenizer is None:
            return str(token)
        decoded = str(self.tokenizer.decode([token]))
        if not decoded:
            return ""
        if "\ufffd" in decoded:
            return self._hexadecimal(self._stored(token)) or decoded
        text = plain(decoded)
        inside = self._marked and text[0].islower() and not self._begins_word(token)
        return f"-{text}" if inside else text

    def _stored(self, token: int) -> str:
        """The token as the tokenizer stores it, or as it decodes it."""
        convert = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        stored = None if convert is None else convert([token])[0]
        return stored if isinstance(stored, str) else str(self.tokenizer.decode([token]))

    def _begins_word(self, token: int) -> bool:
        stored = self._stored(token)
        return stored.startswith(_WORD_STARTS) or stored[:1].isspace()

    def _hexadecimal(self, stored: str) -> str:
        """Bytes of a stored token, or "" if it is not written in bytes."""
        match = _BYTE.fullmatch(stored)
        if match is not None:
            return f"<{match[1].upper()}>"
        numbers = [self._bytes.get(c) for c in stored.removeprefix("Ġ") or stored]
        known = [n for n in numbers if n is not None]
        return f"<{bytes(known).hex(' ').upper()}>" if known and len(known) == len(numbers) else ""
