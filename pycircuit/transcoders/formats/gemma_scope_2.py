"""GemmaScope 2, per layer: `transcoder_all/layer_{i}_width_{w}_l0_{s}[_affine]/params.safetensors` and `config.json`.

w_enc [d, F], w_dec [F, d], b_enc, b_dec, threshold; affine_skip_connection [d, d] is used as x @ A.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import hooks
from .files import open_tensors, read_json
from .parts import Asked, Contents, Layer, alike, same_everywhere, take
from .variants import in_order, one_each, tree

NEEDED = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
SKIP = "affine_skip_connection"
_FILE = re.compile(r"(?:.*/)?layer_(\d+)_width_[^/]+/params\.safetensors")


def sees(folder: Path) -> str | None:
    found = _names(folder)
    return f"{len(found)} folders layer_*_width_* with params.safetensors" if found else None


def _names(folder: Path) -> list[str]:
    return [name for name in tree(folder, "params.safetensors") if _FILE.fullmatch(name)]


def read(folder: Path, asked: Asked) -> Contents:
    chosen = one_each(folder, _names(folder), _FILE, asked)
    configs = {at: (folder / name).with_name("config.json") for at, name in chosen.items()}
    said = {path: read_json(path) for path in configs.values() if path.is_file()}
    for at, path in configs.items():
        for key in ("hf_hook_point_in", "hf_hook_point_out"):
            hooks.same_layer(path, key, said.get(path, {}).get(key), at)
    layers = in_order(folder, chosen, lambda at: layer(folder / chosen[at], said.get(configs[at], {})), asked)
    reads, writes = where(said, asked)
    alike(layers, "w_skip")
    model = next((c["model_name"] for c in said.values() if isinstance(c.get("model_name"), str)), None)
    return Contents(folder, layers, False, reads, writes, model, next(iter(said.values()), {}))


def where(said: dict[Path, dict[str, Any]], asked: Asked) -> tuple[str, str]:
    """Where every layer reads and writes; GemmaScope 2's own places where no configuration says it."""
    read = {path: hooks.reads(path, "hf_hook_point_in", c["hf_hook_point_in"]) for path, c in said.items()
            if not asked.reads and "hf_hook_point_in" in c}  # fmt: skip
    write = {path: hooks.writes(path, "hf_hook_point_out", c["hf_hook_point_out"]) for path, c in said.items()
             if not asked.writes and "hf_hook_point_out" in c}  # fmt: skip
    return (
        asked.reads or same_everywhere("reads", read) or "mlp_in",
        asked.writes or same_everywhere("writes", write) or "mlp_out",
    )


def jumps(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("architecture", "jump_relu")
    if kind != "jump_relu":
        raise ValueError(f"load: {path.with_name('config.json')}: architecture must be jump_relu, got {kind!r}")


def layer(path: Path, config: dict[str, Any]) -> Layer:
    tensors = open_tensors(path)
    take(path, tensors, NEEDED, (SKIP,))
    jumps(path, config)
    affine = config.get("affine_connection")
    if isinstance(affine, bool) and affine != (SKIP in tensors):
        raise ValueError(f"load: {path} must hold {SKIP} exactly if config.json says affine_connection, got {affine}")
    w_enc, w_dec, b_enc, b_dec, theta = (tensors[name] for name in NEEDED)
    return Layer(w_enc, b_enc, w_dec, b_dec, theta, tensors.get(SKIP), transposed=True, positive=True)
