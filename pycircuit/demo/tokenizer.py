"""Tokenizer of the demo model: a name is one token, spaces included, so that a circuit has one position for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

BOS = "<bos>"


class NameTokenizer:
    """Text to token ids and back. words: every token's text, in the order of the ids; the first is <bos>.

    Names are matched as they are written and the longest first ("New York City" before "New York"); other words are
    matched in lower case.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        if not self.words or self.words[0] != BOS:
            raise ValueError(f"NameTokenizer: words must begin with {BOS!r}, got {list(self.words[:1])}")
        self._id = {word: i for i, word in enumerate(self.words)}
        self._longest = max(len(word.split()) for word in self.words)

    def encode(self, text: str) -> list[int]:
        """Token ids of <bos> and the text; a word that is no token is an error."""
        words = text.removeprefix(BOS).split()
        ids = [0]
        begin = 0
        while begin < len(words):
            match = self._match(words[begin:])
            if match is None:
                word = words[begin]
                raise ValueError(f"text must hold words the model knows, got {word!r}{self._suggestion(word)}")
            token, count = match
            ids.append(token)
            begin += count
        return ids

    def decode(self, ids: Iterable[int] | int) -> str:
        """Text of the tokens, joined by spaces."""
        return " ".join(self.words[int(i)] for i in ([ids] if isinstance(ids, int) else ids))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.words[int(i)] for i in ids]

    def _match(self, words: list[str]) -> tuple[int, int] | None:
        """(the token of the longest name at the front, the number of its words)."""
        for count in range(min(self._longest, len(words)), 0, -1):
            text = " ".join(words[:count])
            token = self._id.get(text, self._id.get(text.lower()))
            if token is not None:
                return token, count
        return None

    def _suggestion(self, word: str) -> str:
        near = get_close_matches(word, self.words, 3, 0.6)
        return f"; it knows {', '.join(near)}" if near else ""
