"""Texts from files: prose, one text a line, or token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

FORMATS = (".txt", ".jsonl", ".npy", ".safetensors")
_NAMES = ("text", "prompt", "tokens", "ids")  # of what an object in a .jsonl holds


def read(paths: Sequence[Path], by_line: bool = False) -> list[Any]:
    """Strings and lists of token ids, of all files in their order. by_line: a .txt holds one text a line."""
    found: list[Any] = []
    for path in paths:
        if path.suffix not in FORMATS:
            raise ValueError(f"{path} must be one of {', '.join(FORMATS)}, got {path.suffix or 'no ending'!r}")
        found += _plain(path, by_line) if path.suffix == ".txt" else _READERS[path.suffix](path)
    if not found:
        raise ValueError(f"{', '.join(str(p) for p in paths)} must hold at least one text, got none")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, got {error.reason} at byte {error.start}") from None


def _plain(path: Path, by_line: bool) -> list[str]:
    text = _text(path)
    return [line for line in (text.splitlines() if by_line else [text]) if line.strip()]


def _lines(path: Path) -> list[Any]:
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            entry = next((entry[name] for name in _NAMES if name in entry), None)
        if not isinstance(entry, str) and not (isinstance(entry, list) and all(type(t) is int for t in entry)):
            known = ", ".join(_NAMES)
            raise ValueError(f"{path} must hold a text, a list of ids or an object with {known} in line {number}")
        found.append(entry)
    return found


def _rows(path: Path, name: str, array: np.ndarray) -> list[list[int]]:
    """[texts, positions] or [positions]."""
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold token ids, got {name} of {array.dtype} {list(array.shape)}")
    rows: list[list[int]] = np.atleast_2d(array).tolist()
    return rows


def _array(path: Path) -> list[list[int]]:
    try:
        return _rows(path, "an array", np.load(path, allow_pickle=False))
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path} must be an array of token ids: {error}") from None


def _tensors(path: Path) -> list[list[int]]:
    try:
        held = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None
    return [row for name, array in sorted(held.items()) for row in _rows(path, name, array)]


_READERS = {".jsonl": _lines, ".npy": _array, ".safetensors": _tensors}


def token_ids(text: str) -> list[int]:
    """5,17,42 or 5 17 42."""
    words = [word for word in re.split(r"[\s,]+", text.strip()) if word]
    if not words or not all(word.isdigit() for word in words):
        raise ValueError(f"a prompt with --ids must be token ids such as 5,17,42, got {text!r}")
    return [int(word) for word in words]
