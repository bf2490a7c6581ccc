"""Budgets of synchronisations and launches of a trace, which must not grow.

Bounds are today's counts of these very traces; whoever lowers a count lowers its bound. A third of the launches cut
numbers into bfloat16 parts, those of the weights once a trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import builders
import pytest
from gpu_models import call_sites, replacement_model
from pretended_cuda import Counts

import pycircuit as pc
from pycircuit.trace import memory_plan
from pycircuit.trace.sweep import Sweep


@dataclass
class Cost:
    """Cost of tiles, or of a trace. layers: that the tiles went through, added up."""

    tiles: int = 0
    layers: int = 0
    targets: int = 0
    waits: int = 0
    launches: int = 0


def traced(family: str, kind: str, counts: Counts, monkeypatch: pytest.MonkeyPatch) -> tuple[Cost, Cost]:
    """Return the costs of the tiles and of the trace."""
    model, run, tiles = replacement_model(family, kind, "cuda"), Sweep.tile, Cost()

    def counted(self: Sweep, layer: Any, position: Any, vectors: Any, out: Any) -> Any:
        earlier = counts.totals()
        bias = run(self, layer, position, vectors, out)
        waits, launches = (now - then for now, then in zip(counts.totals(), earlier, strict=True))
        tiles.tiles, tiles.targets = tiles.tiles + 1, tiles.targets + len(layer)
        tiles.layers += min(layer[0] + 1, self.columns.layers)
        tiles.waits, tiles.launches = tiles.waits + waits, tiles.launches + launches
        return bias

    monkeypatch.setattr(Sweep, "tile", counted)
    monkeypatch.setattr(memory_plan, "GPU_TILE_BYTES", 1 << 14)
    monkeypatch.setattr(memory_plan, "TILE_TARGETS", 8)
    prompt = builders.prompt()
    counts.clear()
    pc.attribute(model, prompt, max_targets=4, max_features=64, round_size=32, progress=False)
    waits, launches = counts.totals()
    return tiles, Cost(tiles.tiles, tiles.layers, tiles.targets, waits, launches)


@pytest.mark.parametrize(
    ("family", "kind", "waits_a_trace", "launches_a_layer"),
    [("gemma2", "plt", 60, 28.8), ("llama", "clt", 54, 27.7)],
)
def test_budget(
    family: str, kind: str, waits_a_trace: int, launches_a_layer: float, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles, trace = traced(family, kind, counts, monkeypatch)
    assert tiles.waits <= 2, call_sites(counts.synchronisations)
    assert trace.waits <= waits_a_trace, call_sites(counts.synchronisations)
    assert tiles.launches / tiles.layers <= launches_a_layer, call_sites(counts.launches)
