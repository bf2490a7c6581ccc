"""Damage done to files of transcoders by tests."""

from __future__ import annotations

import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def edit(path: Path, **changes: Tensor | None) -> None:
    save_file({k: v for k, v in {**load_file(path), **changes}.items() if v is not None}, path)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def pickled(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)
    rewrite(folder / "config.yaml", old, new)


def archive(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as zipped, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a name that comes twice
        for name, data in members:
            zipped.writestr(name, data)


def array(*shape: int, kind: str = "<f4", fortran: bool = False) -> bytes:
    """The header of an .npy file."""
    text = repr({"descr": kind, "fortran_order": fortran, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def change_json(folder: Path, name: str, index: int, change: Callable[[dict[str, Any]], Any]) -> None:
    path = sorted(folder.rglob(name))[index]
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def swap(folder: Path, name: str) -> None:
    a, b = sorted(folder.rglob(name))[:2]
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    calls, does = [], getattr(module, name)

    def counts(*args: Any) -> Any:
        calls.append(name)
        return does(*args)

    monkeypatch.setattr(module, name, counts)
    return calls
