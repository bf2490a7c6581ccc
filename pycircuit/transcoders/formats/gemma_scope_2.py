"""GemmaScope 2, per layer: `transcoder_all/layer_{i}_width_{w}_l0_{s}[_affine]/params.safetensors` and `config.json`.

w_enc [d, F], w_dec [F, d], b_enc, b_dec, threshold; affine_skip_connection [d, d] is used as x @ A.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pycircuit.transcoders.types import Reads, Writes

from . import hooks
from .config_files import read_json, same_in_every_layer
from .contents import Contents, Layer, require_same_tensors, require_tensors
from .select import Overrides, file_per_layer, find_files, read_layers
from .stored_tensors import open_tensors

NEEDED = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
SKIP = "affine_skip_connection"
_FILE = re.compile(r"(?:.*/)?layer_(\d+)_width_[^/]+/params\.safetensors")


def detect(folder: Path) -> str | None:
    names = _names(folder)
    return f"{len(names)} folders layer_*_width_* with params.safetensors" if names else None


def _names(folder: Path) -> list[str]:
    return [name for name in find_files(folder, "params.safetensors") if _FILE.fullmatch(name)]


def read(folder: Path, overrides: Overrides) -> Contents:
    files = file_per_layer(folder, _names(folder), _FILE, overrides)
    config_paths = {layer: (folder / name).with_name("config.json") for layer, name in files.items()}
    configs = {path: read_json(path) for path in config_paths.values() if path.is_file()}
    for layer, path in config_paths.items():
        for key in ("hf_hook_point_in", "hf_hook_point_out"):
            hooks.require_layer(path, key, configs.get(path, {}).get(key), layer)

    def read_one(layer: int) -> Layer:
        return read_layer(folder / files[layer], configs.get(config_paths[layer], {}))

    layers = read_layers(folder, files, read_one, overrides)
    reads, writes = hook_points(configs, overrides)
    require_same_tensors(layers, "w_skip")
    config: dict[str, Any] = next(iter(configs.values()), {})
    return Contents(folder, layers, False, reads, writes, hooks.model_name(configs.values()), config)


def hook_points(configs: dict[Path, dict[str, Any]], overrides: Overrides) -> tuple[Reads, Writes]:
    """Hook points that every layer reads and writes; GemmaScope 2's own where no configuration says it."""
    reads, writes = overrides.reads, overrides.writes
    key_in, key_out = "hf_hook_point_in", "hf_hook_point_out"
    if not reads:
        ins = {path: hooks.reads(path, key_in, c[key_in]) for path, c in configs.items() if key_in in c}
        reads = same_in_every_layer("reads", ins)
    if not writes:
        outs = {path: hooks.writes(path, key_out, c[key_out]) for path, c in configs.items() if key_out in c}
        writes = same_in_every_layer("writes", outs)
    return reads or "mlp_in", writes or "mlp_out"


def require_jump_relu(path: Path, config: dict[str, Any]) -> None:
    """Raise an error if a configuration names another architecture."""
    kind = config.get("architecture", "jump_relu")
    if kind != "jump_relu":
        raise ValueError(f"load: {path.with_name('config.json')}: architecture must be jump_relu, got {kind!r}")


def read_layer(path: Path, config: dict[str, Any]) -> Layer:
    tensors = open_tensors(path)
    require_tensors(path, tensors, NEEDED, (SKIP,))
    require_jump_relu(path, config)
    affine = config.get("affine_connection")
    if isinstance(affine, bool) and affine != (SKIP in tensors):
        raise ValueError(f"load: {path} must hold {SKIP} exactly if config.json says affine_connection, got {affine}")
    w_enc, w_dec, b_enc, b_dec, theta = (tensors[name] for name in NEEDED)
    return Layer(w_enc, b_enc, w_dec, b_dec, theta, tensors.get(SKIP), transposed=True, positive=True)
