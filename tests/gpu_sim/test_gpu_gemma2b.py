"""Synchronisations and launches of a trace of the gemma2b shape: its layers, heads, prompt and rows, narrow.

Tiles are cut as gemma2b's width has them, so launches and synchronisations are those of the real shape.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import builders
import pytest
import torch
from gpu_models import call_sites
from pretended_cuda import Counts

import pycircuit as pc
from pycircuit.bench import models
from pycircuit.bench.shapes import SHAPES
from pycircuit.trace import memory_plan
from pycircuit.trace.precision import PRECISIONS
from pycircuit.trace.sweep import Sweep
from pycircuit.trace.tile_cost import TileCost, tile_cost

WIDE = SHAPES["gemma2b"]
NARROW = replace(WIDE, width=32, head_width=4, features=64, active=3)
LAUNCHES, SYNCHRONISATIONS = 10_000, 140
CHANGES = {
    "hidden_size": NARROW.width, "num_hidden_layers": NARROW.layers, "num_attention_heads": NARROW.heads,
    "num_key_value_heads": NARROW.kv_heads, "head_dim": NARROW.head_width, "layer_types": ["full_attention"] * 26,
    "max_position_embeddings": 256, "sliding_window": 256,
}  # fmt: skip


def wide_cost(transcoders: pc.PerLayerTranscoders) -> TileCost:
    """Bytes of a tile at gemma2b's own width."""
    query, value = WIDE.heads * WIDE.head_width, WIDE.kv_heads * WIDE.head_width
    w_o, w_v = (torch.empty(shape, device="meta") for shape in ((WIDE.width, query), (value, WIDE.width)))
    layer = SimpleNamespace(w_o=w_o, w_v=w_v, heads=WIDE.heads, post_mlp_norm=None)
    multiplied = PRECISIONS["float32"].row_bytes
    return tile_cost([layer], transcoders, WIDE.width, 4, True, True, multiplied, True)


def test_a_trace_of_gemma2b(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = models.transcoder_weights(NARROW)
    rule = pc.JumpReLU(weights.pop("theta"))
    transcoders = pc.PerLayerTranscoders(**weights, activation=rule).to("cuda")
    model = pc.ReplacementModel(builders.build("gemma2", **CHANGES).to("cuda"), transcoders)
    cost, tiles, fitting = wide_cost(transcoders), [], Sweep.fitting

    def wide_fitting(self: Sweep, layer: list[int], position: list[int], tile_bytes: int, _: int = 0) -> int:
        monkeypatch.setattr(self, "_cost", cost)
        tiles.append(fitting(self, layer, position, memory_plan.GPU_TILE_BYTES))
        return tiles[-1]

    monkeypatch.setattr(Sweep, "fitting", wide_fitting)
    prompt = models.prompt(WIDE.positions) % 50
    pc.attribute(model, prompt[:4], max_features=4, labels=False, progress=False)  # checks that a model needs once
    tiles.clear()
    counts.clear()
    graph = pc.attribute(model, prompt, max_features=WIDE.targets, labels=False, progress=False)
    synchronisations, launches = counts.totals()
    assert graph.certificate < 1e-5
    assert synchronisations < SYNCHRONISATIONS, call_sites(counts.synchronisations)
    assert launches < LAUNCHES, call_sites(counts.launches)
