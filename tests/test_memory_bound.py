"""Memory bounds: `memory=` bounds a trace of any shape, and a refusal names a bound that is enough."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import replacement
from memory_cases import LEAST, Case
from trace_helpers import expected_size

import pycircuit as pc
from pycircuit.files.sizes import parse_bytes
from pycircuit.trace import memory_plan
from pycircuit.trace.precision import PRECISIONS
from pycircuit.trace.sweep import Sweep

pytestmark = pytest.mark.usefixtures("one_thread")
on_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak of memory"
)

CASES = {
    "patterns above the bound": Case("llama", 400, 24, heads=16, kv_heads=4, max_features=16),
    "patterns and a checkpoint": Case("llama", 300, 28, heads=16, max_features=32, checkpoint=True),
    "long prompt": Case("gpt2", 1400, 28, layers=2, width=64, heads=2, max_features=16, active=4),
    "long prompt, at the least": Case("llama", 1000, LEAST, layers=2, width=64, max_features=8, active=4),
    "wide MLP": Case("gpt_neox", 300, 14, inner=4096, max_features=8),
    "wide encoder rows, at the least": Case("llama", 24, LEAST, layers=2, width=512, size=4096, max_features="all"),
    "large vocabulary": Case("gpt2", 16, 5, vocabulary=60000, width=64, max_features=8),
    "every feature": Case("llama", 40, 20, max_features="all", active=8),
    "many features, at the least": Case("gemma2", 40, LEAST, max_features=200, reads="resid_mid"),
    "cross-layer with a skip": Case("gemma2", 128, 14, cross=True, skip=True, reads="resid_mid"),
    "no feature": Case("llama", 200, LEAST, heads=8, max_features=0),
    "half precision": Case("llama", 200, 20, dtype="bfloat16", heads=8),
    "half-precision encoders": Case(
        "llama", 48, 30, layers=2, width=512, size=8192, cross=True, dtype="float16", active=8, max_features=16
    ),
    "double precision": Case("llama", 96, 25, dtype="float64", cross=True),
    "double precision, ranked": Case(
        "llama", 32, 58, layers=6, width=64, size=1024, dtype="float64", active=96, max_features=200
    ),
    "products in parts, at the least": Case("llama", 100, LEAST, width=512, heads=16, precision="bfloat16"),
    "checkpoint, at the least": Case("gpt_neox", 96, LEAST, layers=4, size=2048, active=32, checkpoint=True),
}


def smallest_bound(model: pc.ReplacementModel, ids: Any, max_features: Any, max_targets: int, rows: Any = None) -> int:
    """Return the smallest bound of a trace. rows: (dense, keep) of a checkpoint."""
    size = expected_size(model, ids, max_features, max_targets)
    return memory_plan.smallest_bound(model, size, memory_plan.Fixed(rows=rows))


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    """Peaks of all cases, in one fresh process."""
    cases = json.dumps([asdict(case) for case in CASES.values()])
    script = str(Path(__file__).with_name("memory_cases.py"))
    run = subprocess.run([sys.executable, script, cases], capture_output=True, text=True, check=True)
    return dict(zip(CASES, json.loads(run.stdout), strict=True))


@on_linux
@pytest.mark.parametrize("name", CASES)
def test_resident_memory_stays_within_the_bound(name: str, measured: dict[str, dict[str, Any]]) -> None:
    estimates = measured[name]
    assert estimates["peak"] <= 1.05 * estimates["bound"]
    assert estimates["certificate"] < PRECISIONS[CASES[name].precision].tolerance


@on_linux
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.memory == LEAST])
def test_the_bound_that_a_refusal_names_is_enough(name: str, measured: dict[str, dict[str, Any]]) -> None:
    assert measured[name]["refusals"] == 1


HOLE = """
import torch
from pycircuit.bench import memory
from pycircuit.model.freed_memory import released_at_once

torch.set_num_threads(1)
torch.ones(20 << 20, dtype=torch.uint8)  # freed at once: glibc maps no block below 20 MiB from here on
with released_at_once(64 << 20):
    first, second = (torch.ones(4 << 20, dtype=torch.uint8) for _ in range(2))
    before = memory.own()
    del first
    print(before - memory.own())
"""


@on_linux
def test_a_freed_block_is_not_a_hole_in_the_heap() -> None:
    run = subprocess.run([sys.executable, "-c", HOLE], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 3 << 20


@pytest.mark.parametrize("max_features", ["all", 30, 0])
@pytest.mark.parametrize("kind", ["plt", "clt_skip"])
def test_no_smaller_bound_is_enough(kind: str, max_features: Any) -> None:
    model, ids = replacement("llama", kind, torch.float32), builders.prompt(24)
    smallest = smallest_bound(model, ids, max_features, 1)
    options: dict[str, Any] = {"targets": [5], "max_features": max_features, "progress": False}
    assert pc.attribute(model, ids, memory=smallest, **options).certificate < 1e-5
    with pytest.raises(pc.MemoryBoundError, match=f"at least {memory_plan.readable(smallest, up=True)}"):
        pc.attribute(model, ids, memory=smallest - 1, **options)


@pytest.mark.parametrize("size", [1, 1023, 1025, 3_456_789, (1 << 30) - 1, (1 << 30) + 1, 98_765_432_109])
def test_a_size_rounded_up_is_enough(size: int) -> None:
    read = parse_bytes(memory_plan.readable(size, up=True))
    assert size <= read <= 1.011 * size + 110


def test_patterns_follow_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns are recomputed where the plan says so, however small they are."""
    model, ids = replacement("llama", "plt", torch.float32), builders.prompt()
    stored, freeze = [], model.freeze

    def recorded(prompt: Any, keep: bool | None = None, **options: Any) -> Any:
        stored.append(keep)
        return freeze(prompt, keep, **options)

    monkeypatch.setattr(model, "freeze", recorded)
    for limit in (1 << 30, 100):
        monkeypatch.setattr(memory_plan, "PATTERN_BYTES", limit)
        pc.attribute(model, ids, max_features=0, progress=False)
    assert stored == [True, False]


# Checkpoints under another bound


def traced(folder: Path, memory: int | str | None, max_features: int | None = 40) -> pc.Graph:
    model, ids = replacement("llama", "plt", torch.float32), builders.prompt(60)
    return pc.attribute(model, ids, max_features=max_features, memory=memory, checkpoint=folder, progress=False)


def test_a_checkpoint_resumes_under_another_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and patterns follow the new bound; rows do not change."""
    first, tiles, fitting = traced(tmp_path, None), [], Sweep.fitting
    for file in sorted(tmp_path.glob("rows-*"))[1:]:
        file.unlink()
    monkeypatch.setattr(Sweep, "fitting", lambda *args: tiles.append(args[3]) or fitting(*args))
    model, ids = replacement("llama", "plt", torch.float32), builders.prompt(60)
    bound = int(1.2 * smallest_bound(model, ids, 40, 10, (True, None)))
    again = traced(tmp_path, bound)
    assert tiles and max(tiles) < bound
    assert torch.equal(first.row_node, again.row_node) and again.certificate < 1e-5
    torch.testing.assert_close(again.dense(), first.dense(), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_whole_rows_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose bound would cut rows is refused, with a bound that is enough."""
    monkeypatch.setattr(memory_plan, "FEWEST_ENTRIES", 8)
    traced(tmp_path, None, None)
    model, ids = replacement("llama", "plt", torch.float32), builders.prompt(60)
    smallest = smallest_bound(model, ids, None, 10)
    with pytest.raises(pc.MemoryBoundError, match="to go on with this checkpoint") as refusal:
        traced(tmp_path, smallest, None)
    enough = str(refusal.value).split("at least ")[1].split(" to go on")[0]
    assert traced(tmp_path, enough, None).provenance["keep"] is None


# Estimates


@pytest.mark.parametrize("max_features", [None, 20])
@pytest.mark.parametrize("name", ["demo", "llama", "gpt2"])
def test_the_estimated_time_of_a_short_trace(
    name: str, max_features: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is within a factor of two, in processor time, which other programs do not change."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    if name == "demo":
        model, prompt = pc.load("demo"), "the capital of the state containing Dallas is"
    else:
        model, prompt = replacement(name, "plt", torch.float32), builders.prompt()
    estimates = [pc.estimate(model, prompt, max_features=max_features).seconds for _ in range(5)]
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        pc.attribute(model, prompt, max_features=max_features, progress=False)
        seconds.append(time.perf_counter() - begin)
    assert 0.5 < sorted(estimates)[2] / sorted(seconds)[2] < 2
