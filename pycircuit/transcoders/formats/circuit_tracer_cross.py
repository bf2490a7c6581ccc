"""circuit-tracer, cross-layer: `W_enc_{i}.safetensors`, `W_dec_{i}.safetensors` and `config.yaml`.

W_enc_{i} [F, d], b_enc_{i} [F], b_dec_{i} [d] and, for a JumpReLU, threshold_{i} [F] in the one; W_dec_{i} [F, L-i, d]
in the other. W_skip_{i} [d, d], in either, is used as x @ W_skip: not turned, as the per-layer one is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import circuit_tracer as single
from .files import Stored, open_tensors, read_yaml
from .parts import Asked, Contents, Layer, missing, take

KIND = "cross_layer_transcoder"
_ENCODER = re.compile(r"W_enc_(\d+)\.safetensors(\.index\.json)?")
_DECODER = re.compile(r"W_dec_(\d+)\.safetensors(\.index\.json)?")


def sees(folder: Path) -> str | None:
    layers = single.files(folder, _ENCODER)
    if single.kind_of(folder) == KIND and layers:
        return f"config.yaml of a {KIND} and {len(layers)} files W_enc_*.safetensors"
    return None


def read(folder: Path, asked: Asked) -> Contents:
    config, said_by = read_yaml(folder / "config.yaml"), folder / "config.yaml"
    ours = single.own(folder, config)
    encoders, decoders = single.files(folder, _ENCODER), single.files(folder, _DECODER)
    depth, sizes = asked.layers, ours.get("features")
    count = depth if depth is not None else int(ours.get("layers", 0)) or max(encoders) + 1
    single.within(folder, encoders, count)
    layers = []
    for at in range(count):
        empty = single.holds_none(sizes, at)
        if at not in encoders and not empty and depth is None:
            raise missing(folder, at, f"W_enc_{at}.safetensors")
        if at in encoders and at not in decoders and not empty:
            raise FileNotFoundError(f"load: {folder} must hold W_dec_{at}.safetensors, got its encoder only")
        paths = [folder / names[at] for names in (encoders, decoders) if at in names]
        layers.append(_layer(at, paths, said_by, config, empty) if paths else Layer())
    single.check_alike(said_by, config, layers)
    return Contents(folder, layers, True, *single.where(said_by, config, asked), single.model_name(config), config)


def _layer(at: int, paths: list[Path], said_by: Path, config: dict[str, Any], empty: bool) -> Layer:
    tensors: dict[str, Stored] = {}
    for path in paths:
        for name, stored in open_tensors(path).items():
            if name in tensors:
                raise ValueError(f"load: {path} must not hold {name}, which is in {tensors[name].path.name} already")
            tensors[name] = stored
    needed = tuple(f"{name}_{at}" for name in ("W_enc", "b_enc", "b_dec", "W_dec"))
    optional = tuple(f"{name}_{at}" for name in ("threshold", "W_skip"))
    take(paths[0].parent, tensors, () if empty else needed, (*needed, *optional) if empty else optional)
    w_enc, b_enc, b_dec, w_dec, theta, w_skip = (tensors.get(name) for name in (*needed, *optional))
    activation, jumps = single.rule(said_by, config, at)
    theta = None if empty else single.thresholds(paths[0], said_by, activation, jumps, theta)
    return Layer(w_enc, b_enc, w_dec, b_dec, theta, w_skip, rule=activation)
