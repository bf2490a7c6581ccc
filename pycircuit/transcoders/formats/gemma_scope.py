"""GemmaScope 1: `layer_{i}/width_16k/average_l0_{n}/params.npz`, JumpReLU, float32.

W_enc [d, F], W_dec [F, d], b_enc, b_dec, threshold. No configuration: they read what comes out of the norm before
the MLP but for its gain, and write what is added to the stream, after the norm behind the MLP.
"""

from __future__ import annotations

import re
from pathlib import Path

from .npz import open_npz
from .parts import Asked, Contents, Layer, take
from .variants import in_order, one_each, tree

NEEDED = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_FILE = re.compile(r"(?:.*/)?layer_(\d+)/(?:.*/)?params\.npz")


def sees(folder: Path) -> str | None:
    found = [name for name in tree(folder, "params.npz") if _FILE.fullmatch(name)]
    return f"{len(found)} files layer_*/.../params.npz" if found else None


def read(folder: Path, asked: Asked) -> Contents:
    names = [name for name in tree(folder, "params.npz") if _FILE.fullmatch(name)]
    chosen = one_each(folder, names, _FILE, asked)
    layers = in_order(folder, chosen, lambda at: layer(folder / chosen[at]), asked)
    return Contents(folder, layers, False, asked.reads or "mlp_normed", asked.writes or "mlp_out")


def layer(path: Path) -> Layer:
    tensors = open_npz(path)
    take(path, tensors, NEEDED)
    w_enc, w_dec, b_enc, b_dec, theta = (tensors[name] for name in NEEDED)
    return Layer(w_enc, b_enc, w_dec, b_dec, theta, transposed=True, positive=True)
