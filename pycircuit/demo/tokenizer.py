"""The box model's tokens: words and names, spaces and all, so that a circuit has one place for a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

BOS = "<bos>"


class Names:
    """Text to token ids and back. words: every token's text, in the order of the ids; the first is <bos>.

    Names are matched as they are written and the longest first ("New York City" before "New York"); other words are
    matched in lower case.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        if not self.words or self.words[0] != BOS:
            raise ValueError(f"Names: words must begin with {BOS!r}, got {list(self.words[:1])}")
        self._id = {word: i for i, word in enumerate(self.words)}
        self._longest = max(len(word.split()) for word in self.words)

    def encode(self, text: str) -> list[int]:
        """<bos>, then the tokens of the text; a word that is no token is an error."""
        parts, ids, at = text.removeprefix(BOS).split(), [0], 0
        while at < len(parts):
            found = self._match(parts[at:])
            if found is None:
                raise ValueError(f"text must hold words the model knows, got {parts[at]!r}{self._advice(parts[at])}")
            token, taken = found
            ids.append(token)
            at += taken
        return ids

    def decode(self, ids: Iterable[int] | int) -> str:
        """Tokens joined by spaces; `encode` takes it back to them."""
        return " ".join(self.words[int(i)] for i in ([ids] if isinstance(ids, int) else ids))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.words[int(i)] for i in ids]

    def _match(self, parts: list[str]) -> tuple[int, int] | None:
        """(the token of the longest name at the front, how many words it takes)."""
        for count in range(min(self._longest, len(parts)), 0, -1):
            text = " ".join(parts[:count])
            token = self._id.get(text, self._id.get(text.lower()))
            if token is not None:
                return token, count
        return None

    def _advice(self, word: str) -> str:
        near = get_close_matches(word, self.words, 3, 0.6)
        return f"; it knows {', '.join(near)}" if near else ""
