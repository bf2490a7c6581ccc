"""benchmarks/taped.py: the taped baseline gives the edges of our sweep, and power iteration our ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import builders
import pytest
import torch

import pycircuit as pc
from pycircuit.bench import models
from pycircuit.bench.shapes import Shape
from pycircuit.trace.sweep import Sweep

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SHAPE = Shape("tiny", builders.LAYERS, builders.WIDTH, 4, 2, 8, 24, 6, 9, None, "cpu")


def replacement(family: str, cross_layer: bool, dtype: torch.dtype, skip: bool = False) -> pc.ReplacementModel:
    kind = pc.CrossLayerTranscoder if cross_layer else pc.PerLayerTranscoders
    w = models.transcoder_weights(replace(SHAPE, cross_layer=cross_layer))
    rule = pc.JumpReLU(w["theta"])
    w_skip = [torch.eye(SHAPE.width)] * SHAPE.layers if skip else None
    transcoders = kind(w["w_enc"], w["b_enc"], w["w_dec"], w["b_dec"], rule, w_skip, reads="mlp_in")
    return pc.ReplacementModel(builders.build(family, dtype), transcoders.to(dtype))


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import taped as module

    return module


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cross_layer", [False, True], ids=["plt", "clt"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_edges_are_the_sweeps(taped: Any, family: str, cross_layer: bool, dtype: torch.dtype) -> None:
    model = replacement(family, cross_layer, dtype)
    local = model.freeze(builders.prompt())
    last = local.model.positions - 1
    layer, position = [model.depth, 2, 1, 1, 0], [last, last, 3, last, 2]
    vectors = torch.randn(5, model.width, generator=torch.Generator().manual_seed(0), dtype=dtype)
    expected, _ = Sweep(local).rows(layer, position, vectors)
    edges = taped.TapedModel(local, batch=6).rows(layer, position, vectors)
    assert expected.shape == edges.shape and bool((expected.norm(dim=1) > 0).all())
    assert float(((edges - expected).norm(dim=1) / expected.norm(dim=1)).max()) < TOLERANCE[dtype]


def test_the_tape_lives_from_batch_to_batch(taped: Any) -> None:
    local = replacement("llama", False, torch.float32).freeze(builders.prompt())
    model, vectors = taped.TapedModel(local, batch=1), torch.ones(1, local.model.width)
    assert torch.equal(model.rows([2], [3], vectors), model.rows([2], [3], vectors))


def test_skips_are_refused(taped: Any) -> None:
    local = replacement("llama", False, torch.float32, skip=True).freeze(builders.prompt())
    with pytest.raises(ValueError, match="transcoders must have no skip"):
        taped.TapedModel(local, batch=1)


def test_power_iteration_gives_our_influence(taped: Any) -> None:
    model = replacement("llama", False, torch.float32)
    graph = pc.attribute(model, builders.prompt(), max_targets=3, progress=False)
    rows = graph.dense()[graph.row_node]
    weight = torch.zeros(rows.shape[1])
    weight[graph.first_target :] = graph.targets.weights.float()
    influence = taped.ranking(rows, graph.row_node, weight)[: graph.first_target]
    expected = graph.influence()[: graph.first_target].float()
    assert float(expected.sum()) > 1.1 * float(weight.sum())  # more than one hop
    assert torch.allclose(influence, expected, rtol=1e-4, atol=1e-6)
