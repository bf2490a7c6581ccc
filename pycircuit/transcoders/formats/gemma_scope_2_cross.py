"""GemmaScope 2, cross-layer: `clt/width_{w}_l0_{s}[_affine]/params_layer_{i}.safetensors` (and `config.json`).

As per layer, but w_dec [F, L, d] has a slot for every layer of the model; those below its own are not used.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import hooks
from .config_files import read_json
from .contents import Contents, Layer, require_same_tensors, require_tensors
from .gemma_scope_2 import NEEDED, SKIP, hook_points, require_jump_relu
from .select import Overrides, file_per_layer, find_files, read_layers
from .stored_tensors import StoredTensor, open_tensors

_FILE = re.compile(r"(?:.*/)?params_layer_(\d+)\.safetensors")


def detect(folder: Path) -> str | None:
    names = _names(folder)
    return f"{len(names)} files params_layer_*.safetensors" if names else None


def _names(folder: Path) -> list[str]:
    return [name for name in find_files(folder, ".safetensors") if _FILE.fullmatch(name)]


def read(folder: Path, overrides: Overrides) -> Contents:
    files = file_per_layer(folder, _names(folder), _FILE, overrides)
    folders = {(folder / name).parent for name in files.values()}
    configs = {path: read_json(path) for inner in sorted(folders) for path in sorted(inner.glob("config*.json"))}
    for path, config in configs.items():
        require_jump_relu(path, config)
    layers = read_layers(folder, files, lambda layer: read_layer(folder / files[layer], layer), overrides)
    require_same_tensors(layers, "w_skip")
    reads, writes = hook_points(configs, overrides)
    first: dict[str, Any] = next(iter(configs.values()), {})
    return Contents(folder, layers, True, reads, writes, hooks.model_name(configs.values()), first)


def read_layer(path: Path, layer: int) -> Layer:
    tensors = open_tensors(path)
    require_tensors(path, tensors, NEEDED, (SKIP,))
    w_enc, w_dec, b_enc, b_dec, theta = (tensors[name] for name in NEEDED)
    contents = Layer(w_enc, b_enc, _used_slots(w_dec, layer), b_dec, theta, tensors.get(SKIP))
    return replace(contents, transposed=True, positive=True)


def _used_slots(w_dec: StoredTensor, layer: int) -> StoredTensor:
    if len(w_dec.shape) != 3 or w_dec.shape[1] <= layer:
        raise ValueError(
            f"load: {w_dec} must have shape [features, layers, width] with more than {layer} layers, "
            f"got {list(w_dec.shape)}"
        )
    return w_dec.slots(layer)
