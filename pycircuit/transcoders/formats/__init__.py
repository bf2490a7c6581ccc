"""Transcoders on disk: recognised from their files, loaded with decoders left there, saved whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pycircuit.ops import BatchTopK, JumpReLU, TopK
from pycircuit.transcoders.types import READS, WRITES, CrossLayerTranscoder, Transcoders

from . import (
    circuit_tracer,
    circuit_tracer_cross,
    crosslayer_transcoder,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_cross,
    hooks,
    listed,
    llamascopium,
    saelens,
    sparsify,
)
from .hub import locate
from .parts import Asked, Contents, Layer, assemble, describe
from .writing import destination, write_folder

__all__ = ["Asked", "Contents", "Format", "Layer", "Recognised", "load", "recognise", "register_format", "save"]

CACHE = 4 << 30  # bytes of decoder rows kept


@dataclass(frozen=True)
class Format:
    """A way to lay transcoders out in a folder.

    sees(folder): what there is to see of it, in words, or None; reads no tensor. read(folder, asked): what the files
    say, as `Contents`.
    """

    name: str
    sees: Callable[[Path], str | None]
    read: Callable[[Path, Asked], Contents]


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("circuit-tracer, files elsewhere", listed.sees, listed.read),
        Format("circuit-tracer, per layer", circuit_tracer.sees, circuit_tracer.read),
        Format("circuit-tracer, cross-layer", circuit_tracer_cross.sees, circuit_tracer_cross.read),
        Format("crosslayer-transcoder", crosslayer_transcoder.sees, crosslayer_transcoder.read),
        Format("Llama-Scope-2", llamascopium.sees, llamascopium.read),
        Format("SAELens", saelens.sees, saelens.read),
        Format("sparsify", sparsify.sees, sparsify.read),
        Format("GemmaScope 2, cross-layer", gemma_scope_2_cross.sees, gemma_scope_2_cross.read),
        Format("GemmaScope 2, per layer", gemma_scope_2.sees, gemma_scope_2.read),
        Format("GemmaScope 1", gemma_scope.sees, gemma_scope.read),
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


def recognise(path: str | os.PathLike[str]) -> Recognised:
    """The format of a local folder or hub id, by its files; no tensor is read."""
    folder = locate(path)
    for row in FORMATS.values():
        saw = row.sees(folder)
        if saw is not None:
            return Recognised(folder, row, saw)
    names = sorted(p.name for p in folder.iterdir())
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "nothing"
    raise ValueError(f"load: {folder} must hold one of: {'; '.join(FORMATS)}; got a folder with {shown}")


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
    variant: parts of a path, with commas, that say which of several sets is meant. reads, writes: as of
    pc.PerLayerTranscoders, where the files do not say it or are wrong.
    """
    if dtype is not None and dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"load: dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    kept, seen = size_of(cache), recognise(path)
    contents = seen.format.read(seen.path, asked(layers, variant, reads, writes))
    return assemble(contents, device, dtype, lazy, kept)


def asked(layers: int | None, variant: str | None, reads: str | None, writes: str | None) -> Asked:
    if layers is not None and (type(layers) is not int or layers < 1):
        raise ValueError(f"load: layers must be a whole number of at least 1, got {layers!r}")
    for name, value, allowed in (("reads", reads, READS), ("writes", writes, WRITES)):
        if value is not None and value not in allowed:
            raise ValueError(f"load: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return Asked(layers, variant, reads, writes)


def size_of(cache: int | str) -> int:
    """Bytes, from a number or such as "4GiB"."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", cache) if isinstance(cache, str) else None
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
    _write(transcoders, target, model, scan, None)
    return target


def _write(
    transcoders: Transcoders, target: Path, model: str | None, scan: str | None, key: dict[str, Any] | None
) -> None:
    import yaml

    layout = circuit_tracer_cross if isinstance(transcoders, CrossLayerTranscoder) else circuit_tracer
    files = (
        file
        for at in range(transcoders.depth)
        for file in layout.layer_files(transcoders, at, _bias(transcoders, at), _theta(transcoders, at)).items()
    )
    config = {
        "model_name": model,
        "model_kind": layout.KIND,
        "feature_input_hook": hooks.READ_NAMES[transcoders.reads],
        "feature_output_hook": hooks.WRITE_NAMES[transcoders.writes],
        "scan": target.name if scan is None else scan,
        **_activation(transcoders),
        "pycircuit": _own(transcoders),
    }
    text = yaml.safe_dump({k: v for k, v in config.items() if v is not None}, sort_keys=False)
    write_folder("save", target, files, {"config.yaml": text}, key)


def _bias(transcoders: Transcoders, at: int) -> torch.Tensor | None:
    """circuit-tracer wants a b_dec for every encoder."""
    w_enc, bias = transcoders.w_enc[at], transcoders.b_dec[at]
    return w_enc.new_zeros(w_enc.shape[1]) if bias is None and w_enc is not None else bias


def _theta(transcoders: Transcoders, at: int) -> torch.Tensor | None:
    """Thresholds of a layer, one a feature, where its rule has any."""
    rule, w_enc = transcoders.activation[at], transcoders.w_enc[at]
    if w_enc is None or not isinstance(rule, JumpReLU | BatchTopK):
        return None
    wide = torch.float64 if w_enc.dtype == torch.float64 else torch.float32
    theta = rule.theta if isinstance(rule, JumpReLU) else max(rule.threshold, 0.0)
    if not isinstance(theta, torch.Tensor):
        theta = torch.tensor(float(theta), dtype=wide)
    return theta.expand(w_enc.shape[0]) if theta.numel() == 1 else theta


def _activation(transcoders: Transcoders) -> dict[str, Any]:
    """As others say it, where all layers are alike and files do not say it themselves."""
    rules = [r for w, r in zip(transcoders.w_enc, transcoders.activation, strict=True) if w is not None]
    if rules and isinstance(rules[0], TopK) and all(r == rules[0] for r in rules):
        return {"activation": "topk", "k": rules[0].k}
    return {}


def _own(transcoders: Transcoders) -> dict[str, Any]:
    t = transcoders
    rules = [describe(rule) for rule in t.activation]
    return {
        "layers": t.depth,
        "features": [None if w is None else w.shape[0] for w in t.w_enc],
        "reads": t.reads,
        "writes": t.writes,
        "activation": rules[0] if all(r == rules[0] for r in rules) else rules,
    }
