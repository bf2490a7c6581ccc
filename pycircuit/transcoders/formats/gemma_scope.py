"""GemmaScope 1: `layer_{i}/width_16k/average_l0_{n}/params.npz`, JumpReLU, float32.

W_enc [d, F], W_dec [F, d], b_enc, b_dec, threshold. No configuration: they read what comes out of the norm before
the MLP but for its gain, and write what is added to the stream, after the norm behind the MLP.
"""

from __future__ import annotations

import re
from pathlib import Path

from .contents import Contents, Layer, require_tensors
from .npz import open_npz
from .select import Overrides, file_per_layer, find_files, read_layers

NEEDED = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_FILE = re.compile(r"(?:.*/)?layer_(\d+)/(?:.*/)?params\.npz")


def detect(folder: Path) -> str | None:
    names = _names(folder)
    return f"{len(names)} files layer_*/.../params.npz" if names else None


def _names(folder: Path) -> list[str]:
    return [name for name in find_files(folder, "params.npz") if _FILE.fullmatch(name)]


def read(folder: Path, overrides: Overrides) -> Contents:
    files = file_per_layer(folder, _names(folder), _FILE, overrides)
    layers = read_layers(folder, files, lambda layer: read_layer(folder / files[layer]), overrides)
    return Contents(folder, layers, False, overrides.reads or "mlp_normed", overrides.writes or "mlp_out")


def read_layer(path: Path) -> Layer:
    tensors = open_npz(path)
    require_tensors(path, tensors, NEEDED)
    w_enc, w_dec, b_enc, b_dec, theta = (tensors[name] for name in NEEDED)
    return Layer(w_enc, b_enc, w_dec, b_dec, theta, transposed=True, positive=True)
