"""The table of formats, and the format of a folder by its files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pycircuit.files.reading import reword_os_errors

from . import (
    circuit_tracer,
    circuit_tracer_cross,
    crosslayer_transcoder,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_cross,
    llamascopium,
    saelens,
    sparsify,
    url_list,
)
from .contents import Contents
from .hub import local_folder
from .select import Overrides

Detect = Callable[[Path], str | None]
Read = Callable[[Path, Overrides], Contents]


@dataclass(frozen=True)
class Format:
    """A way to lay transcoders out in a folder.

    detect(folder): the evidence for it, in words, or None; reads no tensor. read(folder, overrides): the contents of
    its files. files: the names it is known by, in words.
    """

    name: str
    detect: Detect
    read: Read
    files: str = ""


_ROWS = (
    Format(
        "circuit-tracer, files elsewhere",
        url_list.detect,
        url_list.read,
        "config.yaml with transcoders:, a list of hf:// locations or paths",
    ),
    Format(
        "circuit-tracer, per layer",
        circuit_tracer.detect,
        circuit_tracer.read,
        "config.yaml of a transcoder_set, layer_*.safetensors",
    ),
    Format(
        "circuit-tracer, cross-layer",
        circuit_tracer_cross.detect,
        circuit_tracer_cross.read,
        "config.yaml of a cross_layer_transcoder, W_enc_*.safetensors, W_dec_*.safetensors",
    ),
    Format(
        "crosslayer-transcoder",
        crosslayer_transcoder.detect,
        crosslayer_transcoder.read,
        "config.yaml of a model with its class, checkpoint.safetensors",
    ),
    Format(
        "Llama-Scope-2",
        llamascopium.detect,
        llamascopium.read,
        "config.json with a sae_type, sae_weights.safetensors",
    ),
    Format("SAELens", saelens.detect, saelens.read, "cfg.json, sae_weights.safetensors"),
    Format("sparsify", sparsify.detect, sparsify.read, "*.mlp/cfg.json, *.mlp/sae.safetensors"),
    Format(
        "GemmaScope 2, cross-layer",
        gemma_scope_2_cross.detect,
        gemma_scope_2_cross.read,
        "params_layer_*.safetensors",
    ),
    Format("GemmaScope 2, per layer", gemma_scope_2.detect, gemma_scope_2.read, "layer_*_width_*/params.safetensors"),
    Format("GemmaScope 1", gemma_scope.detect, gemma_scope.read, "layer_*/.../params.npz"),
)
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}


def register_format(name: str, detect: Detect, read: Read) -> Format:
    """Add a format, or replace the one of this name; it is tried before those that are there."""
    if not name or not callable(detect) or not callable(read):
        raise TypeError("register_format: needs a name and two functions, detect(folder) and read(folder, overrides)")
    others = {key: row for key, row in FORMATS.items() if key != name}
    FORMATS.clear()
    FORMATS.update({name: Format(name, detect, read), **others})
    return FORMATS[name]


@dataclass(frozen=True)
class Recognised:
    """A folder, its format, and the evidence for it."""

    path: Path
    format: Format
    evidence: str

    def __str__(self) -> str:
        return f"{self.path}: {self.format.name} ({self.evidence})"


def recognise(path: str | os.PathLike[str], variant: str | None = None) -> Recognised:
    """Return the format of a local folder or hub id, by its files; no tensor is read. variant: all that is fetched."""
    folder = local_folder(path, variant)
    with reword_os_errors(folder):
        for row in FORMATS.values():
            evidence = row.detect(folder)
            if evidence is not None:
                return Recognised(folder, row, evidence)
        names = sorted(p.name for p in folder.iterdir())
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "nothing"
    known = "; ".join(f"{row.name} ({row.files})" if row.files else row.name for row in FORMATS.values())
    raise ValueError(f"load: {folder} must hold one of: {known}; got a folder with {shown}")
