"""Texts in files: prose, one text a line, or token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

FORMATS = (".txt", ".jsonl", ".npy", ".safetensors")
_KEYS = ("text", "prompt", "tokens", "ids")  # of an object in a .jsonl
Text: TypeAlias = str | list[int]


@dataclass(frozen=True)
class NumberedText:
    """A text or token ids, with its line in the file (its row in an array), counted from 1."""

    number: int
    text: Text


def read(paths: Sequence[Path]) -> list[Text]:
    """Read the texts and lists of token ids of all files in their order; a .txt is one text."""
    texts = [line.text for path in paths for line in _read(path, _prose)]
    if not texts:
        raise ValueError(f"{', '.join(str(p) for p in paths)} must hold at least one text, got none")
    return texts


def read_lines(path: Path) -> list[NumberedText]:
    """Read the texts and lists of token ids of a file; a .txt has one a line, blank lines aside."""
    lines = _read(path, _plain_lines)
    if not lines:
        raise ValueError(f"{path} must hold at least one text, got none")
    return lines


def _read(path: Path, read_txt: Callable[[Path], list[NumberedText]]) -> list[NumberedText]:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must be one of {', '.join(FORMATS)}, got {path.suffix or 'no ending'!r}")
    return read_txt(path) if path.suffix == ".txt" else _READERS[path.suffix](path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got {error.reason} at byte {error.start}") from None


def _prose(path: Path) -> list[NumberedText]:
    text = _text(path)
    return [NumberedText(1, text)] if text.strip() else []


def _plain_lines(path: Path) -> list[NumberedText]:
    """Lines that are not blank, with the numbers that an editor shows."""
    lines = _text(path).split("\n")
    return [NumberedText(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _json_lines(path: Path) -> list[NumberedText]:
    texts = []
    for line in _plain_lines(path):
        try:
            entry = json.loads(str(line.text))
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            entry = next((entry[name] for name in _KEYS if name in entry), None)
        if not isinstance(entry, str) and not (isinstance(entry, list) and all(type(t) is int for t in entry)):
            keys = ", ".join(_KEYS)
            raise ValueError(f"{path} must hold a text, a list of ids or an object with {keys} in line {line.number}")
        texts.append(NumberedText(line.number, entry))
    return texts


def _rows(path: Path, name: str, array: np.ndarray) -> list[list[int]]:
    """Rows of an array of token ids, [texts, positions] or [positions]."""
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold token ids, got {name} of {array.dtype} {list(array.shape)}")
    rows: list[list[int]] = np.atleast_2d(array).tolist()
    return rows


def _array(path: Path) -> list[NumberedText]:
    try:
        return _numbered(_rows(path, "an array", np.load(path, allow_pickle=False)))
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path} must be an array of token ids: {error}") from None


def _tensors(path: Path) -> list[NumberedText]:
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None
    return _numbered([row for name, array in sorted(arrays.items()) for row in _rows(path, name, array)])


def _numbered(rows: list[list[int]]) -> list[NumberedText]:
    return [NumberedText(number, row) for number, row in enumerate(rows, 1)]


_READERS = {".jsonl": _json_lines, ".npy": _array, ".safetensors": _tensors}


def token_ids(text: str) -> list[int]:
    """Parse token ids written as 5,17,42 or 5 17 42."""
    words = [word for word in re.split(r"[\s,]+", text.strip()) if word]
    if not words or not all(word.isdigit() for word in words):
        raise ValueError(f"a prompt with --ids must be token ids such as 5,17,42, got {text!r}")
    return [int(word) for word in words]
