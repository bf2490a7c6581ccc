"""Transcoders on disk: recognised from their files, loaded with decoders left there, saved whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pycircuit.transcoders.types import READS, WRITES, Transcoders

from . import (
    circuit_tracer,
    circuit_tracer_cross,
    crosslayer_transcoder,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_cross,
    hooks,
    llamascopium,
    saelens,
    saving,
    sparsify,
    url_list,
)
from .files import telling
from .hub import locate
from .parts import MOST_LAYERS, Asked, Contents, Layer, assemble, check
from .report import Report, report
from .writing import destination

__all__ = [
    "Asked", "Contents", "Format", "Layer", "Recognised", "Report", "convert", "inspect", "load", "recognise",
    "register_format", "save",
]  # fmt: skip

CACHE = 4 << 30  # bytes of decoder rows kept


@dataclass(frozen=True)
class Format:
    """A way to lay transcoders out in a folder. files: what it is known by, in words.

    sees(folder): what there is to see of it, in words, or None; reads no tensor. read(folder, asked): what the files
    say, as `Contents`.
    """

    name: str
    sees: Callable[[Path], str | None]
    read: Callable[[Path, Asked], Contents]
    files: str = ""


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "circuit-tracer, files elsewhere",
            url_list.sees,
            url_list.read,
            "config.yaml with transcoders:, a list of hf:// locations or paths",
        ),
        Format(
            "circuit-tracer, per layer",
            circuit_tracer.sees,
            circuit_tracer.read,
            "config.yaml of a transcoder_set, layer_*.safetensors",
        ),
        Format(
            "circuit-tracer, cross-layer",
            circuit_tracer_cross.sees,
            circuit_tracer_cross.read,
            "config.yaml of a cross_layer_transcoder, W_enc_*.safetensors, W_dec_*.safetensors",
        ),
        Format(
            "crosslayer-transcoder",
            crosslayer_transcoder.sees,
            crosslayer_transcoder.read,
            "config.yaml of a model with its class, checkpoint.safetensors",
        ),
        Format(
            "Llama-Scope-2",
            llamascopium.sees,
            llamascopium.read,
            "config.json with a sae_type, sae_weights.safetensors",
        ),
        Format("SAELens", saelens.sees, saelens.read, "cfg.json, sae_weights.safetensors"),
        Format("sparsify", sparsify.sees, sparsify.read, "*.mlp/cfg.json, *.mlp/sae.safetensors"),
        Format(
            "GemmaScope 2, cross-layer",
            gemma_scope_2_cross.sees,
            gemma_scope_2_cross.read,
            "params_layer_*.safetensors",
        ),
        Format("GemmaScope 2, per layer", gemma_scope_2.sees, gemma_scope_2.read, "layer_*_width_*/params.safetensors"),
        Format("GemmaScope 1", gemma_scope.sees, gemma_scope.read, "layer_*/.../params.npz"),
    )
}


def register_format(name: str, sees: Callable[[Path], str | None], read: Callable[[Path, Asked], Contents]) -> Format:
    """Add a format, or replace the one of this name; it is asked before those that are there."""
    if not name or not callable(sees) or not callable(read):
        raise TypeError("register_format: needs a name and two functions, sees(folder) and read(folder, asked)")
    rest = {key: row for key, row in FORMATS.items() if key != name}
    FORMATS.clear()
    FORMATS.update({name: Format(name, sees, read), **rest})
    return FORMATS[name]


@dataclass(frozen=True)
class Recognised:
    """What a folder was taken for, and why."""

    path: Path
    format: Format
    saw: str

    def __str__(self) -> str:
        return f"{self.path}: {self.format.name} ({self.saw})"


def recognise(path: str | os.PathLike[str], variant: str | None = None) -> Recognised:
    """The format of a local folder or hub id, by its files; no tensor is read. variant: all that is fetched of it."""
    folder = locate(path, variant)
    with telling(folder):
        for row in FORMATS.values():
            saw = row.sees(folder)
            if saw is not None:
                return Recognised(folder, row, saw)
        names = sorted(p.name for p in folder.iterdir())
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "nothing"
    known = ", ".join(FORMATS)
    raise ValueError(f"load: {folder} must hold one of: {known}; got a folder with {shown}; see docs/transcoders.md")


def load(
    path: str | os.PathLike[str],
    device: Any = None,
    dtype: torch.dtype | None = None,
    lazy: bool = True,
    layers: int | None = None,
    variant: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
    cache: int | str = CACHE,
) -> Transcoders:
    """Transcoders of a local folder or a hub id `org/repo[/path][@revision]`, of any format in `FORMATS`.

    dtype: what they are converted to as they are read; None: as they are stored. lazy: decoders stay in their files,
    and the rows of a prompt's active features are read when they are needed; `cache` bytes of them are kept.
    layers: the model's number of layers, where some may have no transcoder; without it a missing layer is an error.
    variant: parts of a path, with commas, that say which of several sets is meant: "16k, small, not affine". reads,
    writes: as of pc.PerLayerTranscoders, or the name of a hook, where the files do not say it or are wrong.
    """
    _check_dtype("load", dtype)
    kept, where = size_of(cache), place(device)
    return assemble(_contents(path, asked(layers, variant, reads, writes))[1], where, dtype, lazy, kept)


def _contents(path: str | os.PathLike[str], wanted: Asked) -> tuple[Recognised, Contents]:
    """(what it was taken for, what its files say)."""
    seen = recognise(path, wanted.variant)
    with telling(seen.path):
        contents = seen.format.read(seen.path, wanted)
    if wanted.layers not in (None, len(contents.layers)):
        got = f"{wanted.layers}, and {len(contents.layers)} in {seen.path}"
        raise ValueError(f"load: layers must be the number that the files are for, got {got}")
    check(contents)
    return seen, contents


def _check_dtype(op: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        got = dtype if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ValueError(f"{op}: dtype must be float64, float32, bfloat16 or float16 of torch, got {got}")


def place(device: Any) -> torch.device:
    """Of a device or its name; None: the CPU."""
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"load: device must be such as 'cpu' or 'cuda:0', got {device!r}: {error}") from None


def asked(layers: int | None, variant: str | None, reads: str | None, writes: str | None) -> Asked:
    if layers is not None and (type(layers) is not int or not 1 <= layers <= MOST_LAYERS):
        raise ValueError(f"load: layers must be a whole number of at least 1 and at most {MOST_LAYERS}, got {layers!r}")
    if not isinstance(variant, str | None):
        raise TypeError(f"load: variant must be parts of a path, with commas, got {variant!r}")
    reads = hooks.READS.get(hooks.short(reads), reads)
    writes = hooks.WRITES.get(hooks.short(writes), writes)
    for name, value, allowed in (("reads", reads, READS), ("writes", writes, WRITES)):
        if value is not None and value not in allowed:
            raise ValueError(f"load: {name} must be one of {', '.join(allowed)}, or a hook's name, got {value!r}")
    return Asked(layers, variant, reads, writes)


def size_of(cache: int | str) -> int:
    """Bytes, from a number or such as "4GiB"."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?(\w*)", cache) if isinstance(cache, str) else None
    if found is not None and found[2] in units:
        return int(float(found[1]) * units[found[2]])
    if type(cache) is not int or cache < 0:
        raise ValueError(f"load: cache must be bytes or a size such as '4GiB', got {cache!r}")
    return cache


def save(
    transcoders: Transcoders, path: str | os.PathLike[str], model: str | None = None, scan: str | None = None
) -> Path:
    """Write transcoders to a new folder that circuit-tracer and `load` read. model: the name of their model.

    The folder is there whole or not at all. scan: where their features are described; the folder's name if None.
    """
    if not isinstance(transcoders, Transcoders):
        kind = type(transcoders).__name__
        raise TypeError(f"save: transcoders must be pc.PerLayerTranscoders or pc.CrossLayerTranscoder, got {kind}")
    target = destination("save", path)
    saving.write("save", saving.of_memory(transcoders), target, "pycircuit", model, scan, None)
    return target


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "circuit-tracer",
    dtype: torch.dtype | None = None,
    layers: int | None = None,
    variant: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
) -> Path:
    """Transcoders of any format into a new folder, a layer at a time; arguments as of `load`.

    to: "circuit-tracer" or "pycircuit", which are the same files, or "saelens". The numbers stay as they are unless
    dtype says otherwise. After a failure or a kill the same call goes on with the files that are left to write.
    """
    if to not in saving.LAYOUTS:
        raise ValueError(f"convert: to must be one of {', '.join(saving.LAYOUTS)}, got {to!r}")
    _check_dtype("convert", dtype)
    folder = destination("convert", target)
    contents = _contents(source, asked(layers, variant, reads, writes))[1]
    saving.write(
        "convert", saving.of_files(contents, dtype), folder, to, contents.model, None, _made_of(contents, to, dtype)
    )
    return folder


def _made_of(contents: Contents, to: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a broken run must have begun with for another one to go on: files, how they are read, and by whom."""
    named = sorted({t.path for one in contents.layers for t in one.stored().values()})
    state = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in named]
    how = [version("pycircuit"), to, str(dtype), contents.cross, contents.reads, contents.writes]
    return {"of": state, "how": how, "layers": [one.told() for one in contents.layers]}


def inspect(
    path: str | os.PathLike[str],
    weights: bool = True,
    layers: int | None = None,
    variant: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
) -> Report:
    """What a folder or hub id holds, as `load` would take it; print it, or ask it for .json().

    weights: read all of them too and warn of NaN, dead and repeated features; without it only headers are read.
    """
    seen, contents = _contents(path, asked(layers, variant, reads, writes))
    return report(seen.format.name, seen.saw, contents, weights)
