"""sparsify: a folder a hook point, `layers.3.mlp/` and the like, with `sae.safetensors` and `cfg.json`.

encoder.weight [F, d], encoder.bias [F], W_dec [F, d], b_dec [d]; W_skip [d, d] is used as x @ W_skip.T. The k largest
after a ReLU. They read what goes into the MLP and write what comes out of it, before any norm.
"""

from __future__ import annotations

import re
from pathlib import Path

from pycircuit.ops import TopK

from .config_files import flag, read_json, whole_number
from .contents import Contents, Layer, require_tensors
from .select import Overrides, file_per_layer, find_files, read_layers, require_configs
from .stored_tensors import open_tensors

NEEDED = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
_FILE = re.compile(r"(?:.*[./])?(?:layers|h|blocks)\.(\d+)\.mlp/sae\.safetensors")


def detect(folder: Path) -> str | None:
    names = _with_config(folder)
    return f"{len(names)} folders *.mlp with sae.safetensors and cfg.json" if names else None


def _names(folder: Path) -> list[str]:
    return [name for name in find_files(folder, "sae.safetensors") if _FILE.fullmatch(name)]


def _with_config(folder: Path) -> list[str]:
    return [name for name in _names(folder) if (folder / name).with_name("cfg.json").is_file()]


def read(folder: Path, overrides: Overrides) -> Contents:
    require_configs(folder, _names(folder), overrides, "cfg.json")
    files = file_per_layer(folder, _with_config(folder), _FILE, overrides)
    layers = read_layers(folder, files, lambda layer: read_layer(folder / files[layer]), overrides)
    config = read_json((folder / next(iter(files.values()))).with_name("cfg.json"))
    reads, writes = overrides.reads or "mlp_in", overrides.writes or "mlp_raw"
    return Contents(folder, layers, False, reads, writes, config=config)


def read_layer(path: Path) -> Layer:
    config_path = path.with_name("cfg.json")
    config, tensors = read_json(config_path), open_tensors(path)
    if config.get("transcode") is not True:
        got = config.get("transcode")
        raise ValueError(f"load: {config_path}: transcode must be true, got {got!r}; this is no transcoder")
    kind = config.get("activation", "topk")
    if kind != "topk":
        raise ValueError(
            f"load: {config_path}: activation must be topk, got {kind!r}, which pycircuit does not compute"
        )
    skip = flag(config_path, config, "skip_connection", False)
    require_tensors(path, tensors, (*NEEDED, "W_skip") if skip else NEEDED)
    w_enc, b_enc, w_dec, b_dec = (tensors[name] for name in NEEDED)
    rule = TopK(whole_number(config_path, "k", config.get("k", 32), 1))
    return Layer(w_enc, b_enc, w_dec, b_dec, None, tensors.get("W_skip"), rule, skip_transposed=True)
