"""sparsify: a folder a hook point, `layers.3.mlp/` and the like, with `sae.safetensors` and `cfg.json`.

encoder.weight [F, d], encoder.bias [F], W_dec [F, d], b_dec [d]; W_skip [d, d] is used as x @ W_skip.T. The k largest
after a ReLU. They read what goes into the MLP and write what comes out of it, before any norm.
"""

from __future__ import annotations

import re
from pathlib import Path

from pycircuit.ops import TopK

from .files import open_tensors, read_json
from .parts import Asked, Contents, Layer, flag, take, whole
from .variants import beside, in_order, one_each, tree

NEEDED = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
_FILE = re.compile(r"(?:.*[./])?(?:layers|h|blocks)\.(\d+)\.mlp/sae\.safetensors")


def sees(folder: Path) -> str | None:
    found = _names(folder)
    return f"{len(found)} folders *.mlp with sae.safetensors and cfg.json" if found else None


def _names(folder: Path) -> list[str]:
    return [
        name
        for name in tree(folder, "sae.safetensors")
        if _FILE.fullmatch(name) and (folder / name).with_name("cfg.json").is_file()
    ]


def read(folder: Path, asked: Asked) -> Contents:
    beside(folder, [name for name in tree(folder, "sae.safetensors") if _FILE.fullmatch(name)], asked, "cfg.json")
    chosen = one_each(folder, _names(folder), _FILE, asked)
    layers = in_order(folder, chosen, lambda at: layer(folder / chosen[at]), asked)
    config = read_json((folder / next(iter(chosen.values()))).with_name("cfg.json"))
    return Contents(folder, layers, False, asked.reads or "mlp_in", asked.writes or "mlp_raw", config=config)


def layer(path: Path) -> Layer:
    said_by = path.with_name("cfg.json")
    config, tensors = read_json(said_by), open_tensors(path)
    if config.get("transcode") is not True:
        got = config.get("transcode")
        raise ValueError(f"load: {said_by}: transcode must be true, got {got!r}; this is no transcoder")
    kind = config.get("activation", "topk")
    if kind != "topk":
        raise ValueError(f"load: {said_by}: activation must be topk, got {kind!r}, which pycircuit does not compute")
    skip = flag(said_by, config, "skip_connection", False)
    take(path, tensors, (*NEEDED, "W_skip") if skip else NEEDED)
    w_enc, b_enc, w_dec, b_dec = (tensors[name] for name in NEEDED)
    rule = TopK(whole(said_by, "k", config.get("k", 32), 1))
    return Layer(w_enc, b_enc, w_dec, b_dec, None, tensors.get("W_skip"), rule, skip_back=True)
