"""A `config.yaml` that lists a file for each layer: `hf://org/repo/path?revision=`, or a path inside its folder.

circuit-tracer publishes it for sets whose files are elsewhere. Each file is one of circuit-tracer's, GemmaScope's or
GemmaScope 2's; null, or a layer left out of a mapping, is a layer without a transcoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import circuit_tracer, gemma_scope, gemma_scope_2, gemma_scope_2_cross, hooks
from .circuit_tracer_cross import KIND as CROSS
from .config_files import path_inside, read_yaml
from .contents import MOST_LAYERS, Contents, Layer, require_same_tensors
from .hub import fetched_file
from .select import Overrides
from .stored_tensors import open_tensors


def detect(folder: Path) -> str | None:
    path = folder / "config.yaml"
    listed = read_yaml(path).get("transcoders") if path.is_file() else None
    if listed is None:
        return None
    return f"config.yaml that lists {len(listed) if hasattr(listed, '__len__') else 0} files"


def read(folder: Path, overrides: Overrides) -> Contents:
    config_path = folder / "config.yaml"
    config = read_yaml(config_path)
    kind = config.get("model_kind", circuit_tracer.KIND)
    if kind not in (circuit_tracer.KIND, CROSS):
        raise ValueError(f"load: {config_path}: model_kind must be {circuit_tracer.KIND} or {CROSS}, got {kind!r}")
    locations = _locations(config_path, config["transcoders"])
    last = max(locations)
    count = last + 1 if overrides.layers is None else overrides.layers
    if last >= count:
        raise ValueError(f"load: layers must be at least {last + 1}, as {config_path} lists, got {count}")
    paths = {layer: _local_path(config_path, name) for layer, name in locations.items() if name is not None}

    def read_one(layer: int) -> Layer:
        return _read_layer(paths[layer], layer, config_path, config, kind == CROSS) if layer in paths else Layer()

    layers = [read_one(layer) for layer in range(count)]
    require_same_tensors(layers, "theta")
    reads, writes = circuit_tracer.hook_points(config_path, config, overrides)
    return Contents(folder, layers, kind == CROSS, reads, writes, hooks.model_name([config]), config)


def _locations(config_path: Path, listed: Any) -> dict[int, str | None]:
    """The location of each layer's file."""
    locations = dict(enumerate(listed)) if isinstance(listed, list) else listed
    if not isinstance(locations, dict) or not locations:
        raise ValueError(f"load: {config_path}: transcoders must list a file for each layer, got {listed!r}")
    for layer, name in locations.items():
        if type(layer) is not int or not 0 <= layer < MOST_LAYERS:
            raise ValueError(f"load: {config_path}: transcoders must be listed by layer, got {layer!r}")
        if name is not None and not isinstance(name, str):
            raise ValueError(f"load: {config_path}: transcoders must be locations, got {name!r} for layer {layer}")
    return locations


def _local_path(config_path: Path, name: str) -> Path:
    return fetched_file(name) if name.startswith("hf://") else path_inside(config_path.parent, name, config_path)


def _read_layer(path: Path, layer: int, config_path: Path, config: dict[str, Any], cross: bool) -> Layer:
    """The layer of a file: an archive is GemmaScope's; a lower-case w_enc is GemmaScope 2's."""
    if path.suffix == ".npz":
        if cross:
            raise ValueError(f"load: {path} must be a safetensors file of a cross-layer transcoder, got an archive")
        return gemma_scope.read_layer(path)
    if cross:
        return gemma_scope_2_cross.read_layer(path, layer)
    if "w_enc" in open_tensors(path):
        return gemma_scope_2.read_layer(path, {})
    return circuit_tracer.read_layer(path, config_path, config, layer)
