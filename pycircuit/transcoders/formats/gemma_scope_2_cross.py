"""GemmaScope 2, cross-layer: `clt/width_{w}_l0_{s}[_affine]/params_layer_{i}.safetensors` (and `config.json`).

As per layer, but w_dec [F, L, d] has a slot for every layer of the model; those below its own are not used.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from .files import Stored, open_tensors, read_json
from .gemma_scope_2 import NEEDED, SKIP, jumps, where
from .parts import Asked, Contents, Layer, alike, take
from .variants import in_order, one_each, tree

_FILE = re.compile(r"(?:.*/)?params_layer_(\d+)\.safetensors")


def sees(folder: Path) -> str | None:
    found = _names(folder)
    return f"{len(found)} files params_layer_*.safetensors" if found else None


def _names(folder: Path) -> list[str]:
    return [name for name in tree(folder, ".safetensors") if _FILE.fullmatch(name)]


def read(folder: Path, asked: Asked) -> Contents:
    chosen = one_each(folder, _names(folder), _FILE, asked)
    folders = {(folder / name).parent for name in chosen.values()}
    said = {path: read_json(path) for f in sorted(folders) for path in sorted(f.glob("config*.json"))}
    for path, config in said.items():
        jumps(path, config)
    layers = in_order(folder, chosen, lambda at: layer(folder / chosen[at], at), asked)
    alike(layers, "w_skip")
    model = next((c["model_name"] for c in said.values() if isinstance(c.get("model_name"), str)), None)
    return Contents(folder, layers, True, *where(said, asked), model, next(iter(said.values()), {}))


def layer(path: Path, at: int) -> Layer:
    tensors = open_tensors(path)
    take(path, tensors, NEEDED, (SKIP,))
    w_enc, w_dec, b_enc, b_dec, theta = (tensors[name] for name in NEEDED)
    made = Layer(w_enc, b_enc, _used(w_dec, at), b_dec, theta, tensors.get(SKIP))
    return replace(made, transposed=True, positive=True)


def _used(w_dec: Stored, at: int) -> Stored:
    if len(w_dec.shape) != 3 or w_dec.shape[1] <= at:
        raise ValueError(
            f"load: {w_dec} must have shape [features, layers, width] with more than {at} layers, "
            f"got {list(w_dec.shape)}"
        )
    return w_dec.slots(at)
