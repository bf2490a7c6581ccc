"""circuit-tracer, cross-layer: `W_enc_{i}.safetensors`, `W_dec_{i}.safetensors` and `config.yaml`.

W_enc_{i} [F, d], b_enc_{i} [F], b_dec_{i} [d] and, for a JumpReLU, threshold_{i} [F] in the one; W_dec_{i} [F, L-i, d]
in the other. W_skip_{i} [d, d], in either, is used as x @ W_skip: not transposed, as the per-layer one is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import circuit_tracer as per_layer
from . import hooks
from .config_files import read_yaml
from .contents import Contents, Layer, require_tensors
from .select import Overrides, check_layer_count, missing_layer
from .stored_tensors import StoredTensor, open_tensors

KIND = "cross_layer_transcoder"
_ENCODER = re.compile(r"W_enc_(\d+)\.safetensors(\.index\.json)?")
_DECODER = re.compile(r"W_dec_(\d+)\.safetensors(\.index\.json)?")


def detect(folder: Path) -> str | None:
    files = per_layer.layer_files(folder, _ENCODER)
    if per_layer.model_kind(folder) == KIND and files:
        return f"config.yaml of a {KIND} and {len(files)} files W_enc_*.safetensors"
    return None


def read(folder: Path, overrides: Overrides) -> Contents:
    config_path = folder / "config.yaml"
    config = read_yaml(config_path)
    own = per_layer.own_entries(config_path, config)
    encoders, decoders = per_layer.layer_files(folder, _ENCODER), per_layer.layer_files(folder, _DECODER)
    count = per_layer.layer_count(own, encoders, overrides)
    check_layer_count(folder, encoders, count)
    layers = []
    for layer in range(count):
        empty = per_layer.saved_empty(own, layer)
        if layer not in encoders and not empty and overrides.layers is None:
            raise missing_layer(folder, layer, f"W_enc_{layer}.safetensors")
        if layer in encoders and layer not in decoders and not empty:
            raise FileNotFoundError(f"load: {folder} must hold W_dec_{layer}.safetensors, got its encoder only")
        paths = [folder / names[layer] for names in (encoders, decoders) if layer in names]
        layers.append(_read_layer(layer, paths, config_path, config, empty) if paths else Layer())
    per_layer.check_against_config(config_path, config, layers)
    reads, writes = per_layer.hook_points(config_path, config, overrides)
    return Contents(folder, layers, True, reads, writes, hooks.model_name([config]), config)


def _read_layer(layer: int, paths: list[Path], config_path: Path, config: dict[str, Any], empty: bool) -> Layer:
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, stored in open_tensors(path).items():
            if name in tensors:
                raise ValueError(f"load: {path} must not hold {name}, which is in {tensors[name].path.name} already")
            tensors[name] = stored
    needed = tuple(f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec", "W_dec"))
    optional = tuple(f"{name}_{layer}" for name in ("threshold", "W_skip"))
    require_tensors(paths[0].parent, tensors, () if empty else needed, (*needed, *optional) if empty else optional)
    w_enc, b_enc, b_dec, w_dec, theta, w_skip = (tensors.get(name) for name in (*needed, *optional))
    rule, jumps = per_layer.activation_rule(config_path, config, layer)
    theta = None if empty else per_layer.thresholds(paths[0], config_path, rule, jumps, theta)
    return Layer(w_enc, b_enc, w_dec, b_dec, theta, w_skip, rule=rule)
