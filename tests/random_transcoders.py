"""Random transcoders for the builders' models, with every activation."""

from __future__ import annotations

from typing import Any

import builders
import torch
from torch import Tensor

import pycircuit as pc

LAYERS, WIDTH, SIZE = builders.LAYERS, builders.WIDTH, 24


def normal(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=g).to(dtype)


RULES: dict[str, Any] = {
    "relu": lambda g, dtype: pc.ReLU(),
    "jumprelu": lambda g, dtype: [pc.JumpReLU(torch.rand(SIZE, generator=g).to(dtype)) for _ in range(LAYERS)],
    "one_theta": lambda g, dtype: pc.JumpReLU(0.4),
    "topk": lambda g, dtype: pc.TopK(5),
    "topk_negative": lambda g, dtype: pc.TopK(5, keep_negative=True),
    "batchtopk": lambda g, dtype: pc.BatchTopK(0.6),
    "batchtopks": lambda g, dtype: [pc.BatchTopK(0.25 * n) for n in range(LAYERS)],
    "mixed": lambda g, dtype: [pc.ReLU(), pc.JumpReLU(torch.rand(SIZE, generator=g).to(dtype)), pc.TopK(3)],
}


def random_set(
    cross: bool,
    rule: str = "jumprelu",
    skip: bool = True,
    hole: int | None = None,
    dtype: torch.dtype = torch.float32,
    reads: str = "mlp_in",
    writes: str = "mlp_out",
    bias: bool = True,
) -> Any:
    """Random transcoders for the builders' models; skips are far from symmetric."""
    g = torch.Generator().manual_seed(3)

    def per_layer(*shape: int) -> list[Tensor | None]:
        return [None if n == hole else normal(g, *shape, dtype=dtype) for n in range(LAYERS)]

    w_enc, b_enc = per_layer(SIZE, WIDTH), per_layer(SIZE)
    w_enc = [None if w is None else w / WIDTH**0.5 for w in w_enc]
    slots = [(LAYERS - n,) if cross else () for n in range(LAYERS)]
    w_dec = [None if n == hole else normal(g, SIZE, *slots[n], WIDTH, dtype=dtype) for n in range(LAYERS)]
    b_dec = [normal(g, WIDTH, dtype=dtype) for _ in range(LAYERS)] if bias else None
    w_skip = per_layer(WIDTH, WIDTH) if skip else None
    kind = pc.CrossLayerTranscoder if cross else pc.PerLayerTranscoders
    return kind(w_enc, b_enc, w_dec, b_dec, RULES[rule](g, dtype), w_skip, reads, writes)
