"""What a trace costs the host: synchronisations and launches, which must not grow.

Bounds are today's counts of these very traces; whoever lowers a count lowers its bound. A third of the launches cut
numbers into bfloat16 parts, those of the weights once a trace.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import builders
import pytest
from pretended_cuda import Counts
from test_gpu_traces import model

import pycircuit as pc
from pycircuit.trace import memory_plan
from pycircuit.trace.sweep import Sweep


@dataclass
class Cost:
    """Of all tiles of a trace, and of the whole of it. layers: that tiles went through, added up."""

    tiles: int = 0
    layers: int = 0
    targets: int = 0
    waits: int = 0
    launches: int = 0


def traced(family: str, kind: str, counts: Counts, monkeypatch: pytest.MonkeyPatch) -> tuple[Cost, Cost]:
    """What happened in tiles, and in all of the trace after the prompt was frozen once before."""
    there, run, inside = model(family, kind, "cuda"), Sweep.tile, Cost()

    def counted(self: Sweep, layer: Any, position: Any, vectors: Any, out: Any) -> Any:
        before = counts.totals()
        bias = run(self, layer, position, vectors, out)
        waits, launches = (now - then for now, then in zip(counts.totals(), before, strict=True))
        inside.tiles, inside.targets = inside.tiles + 1, inside.targets + len(layer)
        inside.layers += min(layer[0] + 1, self.columns.layers)
        inside.waits, inside.launches = inside.waits + waits, inside.launches + launches
        return bias

    monkeypatch.setattr(Sweep, "tile", counted)
    monkeypatch.setattr(memory_plan, "GPU_TILE_BYTES", 1 << 14)
    monkeypatch.setattr(memory_plan, "TILE_TARGETS", 8)
    prompt = builders.prompt()
    counts.clear()
    pc.attribute(there, prompt, max_targets=4, max_features=64, round_size=32, progress=False)
    waits, launches = counts.totals()
    return inside, Cost(inside.tiles, inside.layers, inside.targets, waits, launches)


def shown(counter: Counter[str]) -> str:
    return "\n".join(f"{count:6d}  {site}" for site, count in counter.most_common(40))


@pytest.mark.parametrize(
    ("family", "kind", "waits_a_trace", "launches_a_layer"),
    [("gemma2", "plt", 60, 41.2), ("llama", "clt", 54, 36.4)],
)
def test_budget(
    family: str, kind: str, waits_a_trace: int, launches_a_layer: float, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, whole = traced(family, kind, counts, monkeypatch)
    assert inside.waits <= 2, shown(counts.synchronisations)
    assert whole.waits <= waits_a_trace, shown(counts.synchronisations)
    assert inside.launches / inside.layers <= launches_a_layer, shown(counts.launches)
