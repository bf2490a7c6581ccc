"""Scores of a cross-layer transcoder's layers in one launch, against one layer after another."""

from __future__ import annotations

import pytest
import torch
from pycircuit.kernels import edge_scores
from torch import Tensor

import pycircuit as pc
from pycircuit.ops import cases, reference
from pycircuit.ops.cross_layer import CrossLayerFeatures, cross_layer_features

LAYERS, POSITIONS, SIZE, WIDTH = 3, 9, 40, 32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def decoders(dtype: torch.dtype, device: str) -> list[Tensor]:
    g = cases.generator(2)
    return [cases.normal(g, SIZE, LAYERS - layer, WIDTH, dtype=dtype).to(device) for layer in range(LAYERS)]


def active(device: str) -> list[pc.SparseFeatures]:
    g = cases.generator(3)
    return [cases.sparse(g, POSITIONS, SIZE, count).to(device) for count in (4, 0, 9)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_layer", range(LAYERS))
def test_equals_layer_after_layer(target_layer: int, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("a CUDA device is here: Triton compiles for it")
    w_dec, features, ptr = decoders(dtype, device), active(device), cases.prefixes(4, 0, 9, 7).to(device)
    gradient = cases.normal(cases.generator(4), int(ptr[-1]), WIDTH).to(device)
    joined = cross_layer_features(w_dec, features)
    assert joined is not None
    out = cases.normal(cases.generator(5), 4, sum(f.count for f in features) + 2).to(device)
    expected, begin = out.double(), 0
    for layer, f in enumerate(features):
        if layer <= target_layer:
            inputs = (gradient.double(), ptr, pc.SparseFeatures(f.row_ptr, f.index, f.value.double()))
            scores = expected[:, begin : begin + f.count]
            reference.edge_scores(*inputs, w_dec[layer][:, target_layer - layer].double(), scores)
        begin += f.count
    edge_scores.cross_layer_scores(joined, target_layer, gradient, ptr, out)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def of(w_dec: list[Tensor | None]) -> CrossLayerFeatures | None:
    return cross_layer_features(w_dec, active("cpu"))


def test_only_where_rows_lie_in_units() -> None:
    w_dec = decoders(torch.float32, "cpu")
    assert of(w_dec) is not None
    assert of([*w_dec[:2], None]) is None
    assert of([w[..., :24].contiguous() for w in w_dec]) is None
    assert of([*w_dec[:2], w_dec[2].bfloat16()]) is None
    assert of([*w_dec[:2], cases.shifted(w_dec[2])]) is None
    assert of([w[..., :16] for w in w_dec]) is None
