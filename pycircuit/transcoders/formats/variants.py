"""Which of the sets that a folder holds is meant: one file for each layer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .parts import Asked, Layer, missing

_DEEPEST = 6  # folders below the one that is named
_MOST = 100_000  # files


def tree(folder: Path, end: str) -> list[str]:
    """Paths, relative and sorted, of files below a folder that end like this; an index of parts counts as its file."""
    found: set[str] = set()
    for where, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        inner = Path(where).relative_to(folder)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and _leads_on(folder, Path(where, f)))
        if len(inner.parts) >= _DEEPEST:
            folders.clear()
        for name in names:
            name = name.removesuffix(".index.json") if name.endswith(".safetensors.index.json") else name
            if name.endswith(end):
                found.add((inner / name).as_posix())
        if len(found) > _MOST:
            raise ValueError(f"load: {folder} must hold at most {_MOST} files, got more; name a folder inside it")
    return sorted(found)


def _unreadable(error: OSError) -> None:
    """A folder that is passed over would be a layer that is not there."""
    raise error


def _leads_on(folder: Path, inner: Path) -> bool:
    """Whether it is a folder, or a link out to one; a link to what is walked through already could go on for ever."""
    return not inner.is_symlink() or not inner.resolve().is_relative_to(folder.resolve())


def chosen(names: Iterable[str], variant: str | None) -> list[str]:
    """The paths that hold every part of `variant`: "16k, small"; and none that comes after a "not": "not affine"."""
    parts = [part.strip() for part in variant.split(",")] if variant is not None else []
    wanted = [_part(part) for part in parts if not part.startswith("not ")]
    others = [_part(part.removeprefix("not ").strip()) for part in parts if part.startswith("not ")]
    return [name for name in names if all(p.search(name) for p in wanted) and not any(p.search(name) for p in others)]


def _part(text: str) -> re.Pattern[str]:
    """Of a path, between anything that is neither a letter nor a digit."""
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(text)}(?![A-Za-z0-9])" if text else r"(?!)")


def one_each(folder: Path, names: list[str], pattern: re.Pattern[str], asked: Asked) -> dict[int, str]:
    """The file of each layer, out of those that `variant` leaves."""
    found: dict[int, list[str]] = {}
    for name in chosen(names, asked.variant):
        match = pattern.fullmatch(name)
        if match is not None:
            found.setdefault(int(match[1]), []).append(name)
    if not found:
        raise ValueError(f"load: variant must leave some of {_some(names)} of {folder}, got {asked.variant!r}")
    for at, several in sorted(found.items()):
        if len(several) > 1:
            raise ValueError(
                f"load: variant must leave one file for layer {at} of {folder}, got {len(several)}: {_some(several)}; "
                "name parts of the path, such as variant='width_16k,average_l0_71' or '16k, small, not affine'"
            )
    return {at: several[0] for at, several in found.items()}


def beside(folder: Path, names: Iterable[str], asked: Asked, config: str) -> None:
    """Every file of weights has its configuration: without it, it would be a layer that is not there."""
    for name in chosen(names, asked.variant):
        if not (folder / name).with_name(config).is_file():
            raise FileNotFoundError(f"load: {folder / name} must have {config} beside it, got none")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def in_order(folder: Path, found: Mapping[int, object], layer: Callable[[int], Layer], asked: Asked) -> list[Layer]:
    """Every layer from 0 on; a layer that is not there is an error unless the number of layers was given."""
    count = max(found) + 1 if asked.layers is None else asked.layers
    beyond = [at for at in found if at >= count]
    if beyond:
        raise ValueError(f"load: layers must be at least {max(beyond) + 1}, {folder} holds so many, got {count}")
    if asked.layers is None:
        absent = next((at for at in range(count) if at not in found), None)
        if absent is not None:
            raise missing(folder, absent)
    return [layer(at) if at in found else Layer() for at in range(count)]
