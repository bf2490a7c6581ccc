"""Files of the set that is meant, out of those that a folder holds: one for each layer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pycircuit.transcoders.types import Reads, Writes

from .contents import Layer

_DEEPEST = 6  # folders below the one that is named
_MOST = 100_000  # files


@dataclass(frozen=True)
class Overrides:
    """Arguments of `load` that say what the files do not, or say otherwise.

    layers: of the model, where some may have no transcoder. variant: parts of a path, with commas, where a folder
    holds several sets. reads, writes: as transcoders say them.
    """

    layers: int | None = None
    variant: str | None = None
    reads: Reads | None = None
    writes: Writes | None = None


def find_files(folder: Path, end: str) -> list[str]:
    """Paths, relative and sorted, of files below a folder that end like this; an index of shards counts as its file."""
    paths: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        inner = Path(parent).relative_to(folder)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and _leads_on(folder, Path(parent, f)))
        if len(inner.parts) >= _DEEPEST:
            folders.clear()
        for name in names:
            name = name.removesuffix(".index.json") if name.endswith(".safetensors.index.json") else name
            if name.endswith(end):
                paths.add((inner / name).as_posix())
        if len(paths) > _MOST:
            raise ValueError(f"load: {folder} must hold at most {_MOST} files, got more; name a folder inside it")
    return sorted(paths)


def _raise(error: OSError) -> None:
    """Raise the error: a folder that is passed over would be a layer that is missing."""
    raise error


def _leads_on(folder: Path, inner: Path) -> bool:
    """True for a folder, or a link out of this one; a link to what is walked through already could go on for ever."""
    return not inner.is_symlink() or not inner.resolve().is_relative_to(folder.resolve())


def matching(names: Iterable[str], variant: str | None) -> list[str]:
    """Paths that hold every part of `variant`, "16k, small", and none that comes after a "not": "not affine"."""
    terms = [term.strip() for term in variant.split(",")] if variant is not None else []
    wanted = [_pattern(term) for term in terms if not term.startswith("not ")]
    unwanted = [_pattern(term.removeprefix("not ").strip()) for term in terms if term.startswith("not ")]
    return [name for name in names if all(p.search(name) for p in wanted) and not any(p.search(name) for p in unwanted)]


def _pattern(text: str) -> re.Pattern[str]:
    """Pattern of a text in a path, between anything that is neither a letter nor a digit."""
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(text)}(?![A-Za-z0-9])" if text else r"(?!)")


def file_per_layer(folder: Path, names: list[str], pattern: re.Pattern[str], overrides: Overrides) -> dict[int, str]:
    """The file of each layer, out of those that `variant` leaves."""
    files: dict[int, list[str]] = {}
    for name in matching(names, overrides.variant):
        match = pattern.fullmatch(name)
        if match is not None:
            files.setdefault(int(match[1]), []).append(name)
    if not files:
        raise ValueError(f"load: variant must leave some of {_shown(names)} of {folder}, got {overrides.variant!r}")
    for layer, several in sorted(files.items()):
        if len(several) > 1:
            raise ValueError(
                f"load: variant must leave one file for layer {layer} of {folder}, got {len(several)}: "
                f"{_shown(several)}; "
                "name parts of the path, such as variant='width_16k,average_l0_71' or '16k, small, not affine'"
            )
    return {layer: several[0] for layer, several in files.items()}


def require_configs(folder: Path, names: Iterable[str], overrides: Overrides, config: str) -> None:
    """Raise an error unless every file of weights has its configuration; without it, it would be a missing layer."""
    for name in matching(names, overrides.variant):
        if not (folder / name).with_name(config).is_file():
            raise FileNotFoundError(f"load: {folder / name} must have {config} beside it, got none")


def _shown(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def missing_layer(folder: Path, layer: int, name: str = "a file") -> FileNotFoundError:
    """Error about a layer without files."""
    return FileNotFoundError(
        f"load: {folder} must hold {name} of layer {layer}, got none; say layers= (the model's number of layers) where "
        "a layer without a transcoder is meant"
    )


def check_layer_count(folder: Path, layers: Iterable[int], count: int) -> None:
    """Raise an error if a folder holds layers beyond the count."""
    last = max(layers)
    if last >= count:
        raise ValueError(f"load: layers must be at least {last + 1}, {folder} holds so many, got {count}")


def read_layers(
    folder: Path, files: Mapping[int, object], read_layer: Callable[[int], Layer], overrides: Overrides
) -> list[Layer]:
    """Every layer from 0 on; a layer without files is an error unless the number of layers was given."""
    count = max(files) + 1 if overrides.layers is None else overrides.layers
    check_layer_count(folder, files, count)
    if overrides.layers is None:
        absent = next((i for i in range(count) if i not in files), None)
        if absent is not None:
            raise missing_layer(folder, absent)
    return [read_layer(i) if i in files else Layer() for i in range(count)]
