"""A `config.yaml` that lists a file for each layer: `hf://org/repo/path?revision=`, or a path inside its folder.

What circuit-tracer publishes for sets whose files are elsewhere. Each file is one of circuit-tracer's, GemmaScope's or
GemmaScope 2's; null, or a layer left out of a mapping, is a layer without a transcoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import circuit_tracer, gemma_scope, gemma_scope_2, gemma_scope_2_cross
from .circuit_tracer_cross import KIND as CROSS
from .files import inside, open_tensors, read_yaml
from .hub import fetched_file
from .parts import MOST_LAYERS, Asked, Contents, Layer, alike


def sees(folder: Path) -> str | None:
    path = folder / "config.yaml"
    said = read_yaml(path).get("transcoders") if path.is_file() else None
    return None if said is None else f"config.yaml that lists {len(said) if hasattr(said, '__len__') else 0} files"


def read(folder: Path, asked: Asked) -> Contents:
    said_by, config = folder / "config.yaml", read_yaml(folder / "config.yaml")
    kind = config.get("model_kind", circuit_tracer.KIND)
    if kind not in (circuit_tracer.KIND, CROSS):
        raise ValueError(f"load: {said_by}: model_kind must be {circuit_tracer.KIND} or {CROSS}, got {kind!r}")
    named = _entries(said_by, config["transcoders"])
    count = max(named) + 1 if asked.layers is None else asked.layers
    if max(named) >= count:
        raise ValueError(f"load: layers must be at least {max(named) + 1}, as {said_by} lists, got {count}")
    paths = {at: _local(said_by, name) for at, name in named.items() if name is not None}
    layers = [_layer(paths[at], at, said_by, config, kind == CROSS) if at in paths else Layer() for at in range(count)]
    alike(layers, "theta")
    places = circuit_tracer.where(said_by, config, asked)
    return Contents(folder, layers, kind == CROSS, *places, circuit_tracer.model_name(config), config)


def _entries(said_by: Path, listed: Any) -> dict[int, str | None]:
    named = dict(enumerate(listed)) if isinstance(listed, list) else listed
    if not isinstance(named, dict) or not named:
        raise ValueError(f"load: {said_by}: transcoders must list a file for each layer, got {listed!r}")
    for at, name in named.items():
        if type(at) is not int or not 0 <= at < MOST_LAYERS:
            raise ValueError(f"load: {said_by}: transcoders must be listed by layer, got {at!r}")
        if name is not None and not isinstance(name, str):
            raise ValueError(f"load: {said_by}: transcoders must be locations, got {name!r} for layer {at}")
    return named


def _local(said_by: Path, name: str) -> Path:
    return fetched_file(name) if name.startswith("hf://") else inside(said_by.parent, name, said_by)


def _layer(path: Path, at: int, said_by: Path, config: dict[str, Any], cross: bool) -> Layer:
    """By the file: an archive is GemmaScope's; a lower-case w_enc is GemmaScope 2's."""
    if path.suffix == ".npz":
        if cross:
            raise ValueError(f"load: {path} must be a safetensors file of a cross-layer transcoder, got an archive")
        return gemma_scope.layer(path)
    if cross:
        return gemma_scope_2_cross.layer(path, at)
    if "w_enc" in open_tensors(path):
        return gemma_scope_2.layer(path, {})
    return circuit_tracer.layer(path, said_by, config, at)
