"""Runs of a trace: within a memory bound, resumed after a kill, stopped by Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import replacement
from trace_helpers import expected_size, in_small_tiles, same_graph

import pycircuit as pc
from pycircuit.bench import memory, models
from pycircuit.bench.shapes import Shape
from pycircuit.files.sizes import parse_bytes
from pycircuit.progress import Progress
from pycircuit.trace import memory_plan, row_store
from pycircuit.trace.memory_model import MemoryModel
from pycircuit.trace.sweep import Sweep

pytestmark = pytest.mark.usefixtures("one_thread")
TESTS = Path(__file__).parent


# Memory


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("1.5 MB", 1_500_000), ("64k", 64_000), ("7", 7), (9, 9)]
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("bad", ["", "8 apples", "-1", "0", 0, -5, True, 1.5, []])
def test_malformed_sizes(bad: Any) -> None:
    with pytest.raises(ValueError, match="memory must be bytes or a size such as '8GiB'"):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), memory=bad, progress=False)


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("max_features", [None, 40])
def test_rows_that_do_not_fit_keep_their_largest(kind: str, max_features: int | None, monkeypatch: Any) -> None:
    """Dropped entries are counted exactly: the law holds with `dropped`, and every other entry is the full one."""
    model, ids = replacement("llama", kind, torch.float32), builders.prompt()
    full = pc.attribute(model, ids, max_features=max_features, progress=False)
    assert full.provenance["keep"] is None and not full.dropped_mass.any()
    monkeypatch.setattr(memory_plan, "FEWEST_ENTRIES", 8)
    size = expected_size(model, ids, max_features)
    memory = MemoryModel(model, size, True)
    bound = memory_plan.smallest_bound(model, size) + (memory.packed(None) - memory.packed(8)) // 4
    cut = pc.attribute(model, ids, max_features=max_features, memory=bound, progress=False)
    keep = cut.provenance["keep"]
    assert 8 <= keep < full.rows.lengths().max() and cut.rows.lengths().max() == keep
    assert cut.certificate < 1e-5 and float(cut.dropped_mass.min()) >= 0 < float(cut.dropped_mass.max())
    rows = {int(n): r for r, n in enumerate(full.row_node)}
    truth, nodes = full.dense(), cut.row_node.tolist()
    assert [n for n in nodes if n not in rows] == [] or max_features is not None
    common = [r for r, n in enumerate(nodes) if n in rows]
    for r in common:
        column, weight = cut.rows.row(r)
        torch.testing.assert_close(weight, truth[nodes[r]][column.long()], rtol=1e-5, atol=1e-6)
        assert weight.abs().min() >= truth[nodes[r]].abs().topk(keep + 1).values[-1] - 1e-6


def test_a_prompt_that_cannot_fit_is_refused_before_it_runs(monkeypatch: Any) -> None:
    model = replacement("llama", "plt", torch.float32)
    monkeypatch.setattr(model, "freeze", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(pc.MemoryBoundError, match=r"for 13 positions.*got 1\.0 KiB.*shorten the prompt"):
        pc.attribute(model, builders.prompt(), memory=1024, progress=False)
    with pytest.raises(ValueError, match="position must be from"):
        pc.attribute(model, builders.prompt(), position=99, progress=False)


@pytest.mark.parametrize("max_features", [None, 20, 0])
def test_estimate(max_features: int | None) -> None:
    model, ids = replacement("llama", "plt", torch.float32), builders.prompt()
    estimated = pc.estimate(model, ids, max_features=max_features, max_targets=3)
    graph = pc.attribute(model, ids, max_features=max_features, max_targets=3, progress=False)
    assert estimated.features == len(graph.features) and estimated.columns == graph.first_target
    assert abs(estimated.rows - graph.rows.count) <= 3
    assert estimated.bytes == sum(estimated.plan.needs.values()) <= estimated.plan.memory and estimated.seconds > 0
    assert f"{len(ids)} positions" in str(estimated) and "GFLOP" in str(estimated)


def test_packed_rows_rank_as_dense_rows(monkeypatch: Any) -> None:
    model, ids = replacement("llama", "plt", torch.float32), builders.prompt()
    dense = pc.attribute(model, ids, max_features=24, round_size=6, progress=False)
    monkeypatch.setattr(MemoryModel, "dense", lambda self: 1 << 60)
    packed = pc.attribute(model, ids, max_features=24, round_size=6, progress=False)
    assert same_graph(dense, packed)


SHAPE = Shape("bounded", 4, 128, 4, 2, 32, 4096, 32, 256, 256, "cpu")


@pytest.mark.parametrize("max_features", [64, 400])
def test_a_run_stays_within_its_bound(max_features: int) -> None:
    """The system measures dense rows, packed rows and rows cut to their largest entries."""
    model, ids = models.replacement(SHAPE), models.prompt(SHAPE.positions)
    pc.attribute(model, ids[:16], max_features=8, progress=False)  # libraries allocate once
    needed, keeps = pc.estimate(model, ids, max_features=max_features).bytes, []
    smallest = memory_plan.smallest_bound(model, expected_size(model, ids, max_features))
    for bound in (needed, int(0.6 * needed), smallest):
        before = memory.restart_peak()
        graph = pc.attribute(model, ids, max_features=max_features, memory=bound, progress=False)
        assert memory.peak() - before <= 1.05 * bound
        assert graph.certificate < 1e-5
        keeps.append(graph.provenance["keep"])
    assert keeps[0] is None and keeps[2] is not None


def test_out_of_memory_halves_the_tile(monkeypatch: Any) -> None:
    model, ids, sizes = replacement("llama", "plt", torch.float32), builders.prompt(), []
    full = pc.attribute(model, ids, progress=False)
    tile = Sweep.tile

    def scarce(self: Sweep, layer: Any, position: Any, vectors: Any, out: Any) -> Any:
        sizes.append(len(layer))
        edges = tile(self, layer, position, vectors, out)
        if len(layer) > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
        return edges

    monkeypatch.setattr(Sweep, "tile", scarce)
    monkeypatch.setattr(memory_plan, "TILE_BYTES", 1 << 18)
    monkeypatch.setattr(memory_plan, "TILE_TARGETS", 1)
    graph = pc.attribute(model, ids, progress=False)
    assert max(sizes) > 20 >= sizes[-1] and graph.rows.count == full.rows.count
    torch.testing.assert_close(graph.dense(), full.dense(), rtol=1e-5, atol=1e-5)


def test_other_errors_pass(monkeypatch: Any) -> None:
    monkeypatch.setattr(Sweep, "tile", lambda *_: (_ for _ in ()).throw(RuntimeError("no such thing")))
    with pytest.raises(RuntimeError, match="no such thing"):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress=False)


# Checkpoints


SLOW_RUN = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch, builders
torch.set_num_threads(1)
from builders import replacement
import pycircuit as pc
from pycircuit.trace.sweep import Sweep
Sweep.fitting = lambda self, layer, *_: min(3, len(layer))
def slowly(phase, done, total):
    if phase == "sweep" and done:
        print(done, flush=True)
        time.sleep(0.2)
model = replacement("llama", "clt", torch.float32)
pc.attribute(model, builders.prompt(), max_features=60, round_size=9, progress=slowly, checkpoint=sys.argv[2])
"""


def test_a_killed_run_resumes_to_the_identical_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", SLOW_RUN, str(TESTS), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if int(line) > 20:
                break
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    files = {f.name: f.stat().st_mtime_ns for f in folder.glob("rows-*")}
    assert len(files) > 5
    in_small_tiles(monkeypatch)
    model, steps = replacement("llama", "clt", torch.float32), []

    def count(phase: str, done: int, total: int) -> None:
        if phase == "sweep" and done:
            steps.append(done)

    options: dict[str, Any] = {"max_features": 60, "round_size": 9, "progress": count}
    resumed = pc.attribute(model, builders.prompt(), checkpoint=folder, **options)
    assert len(steps) > len(files)
    assert all((folder / name).stat().st_mtime_ns == when for name, when in files.items())  # read, not swept again
    assert same_graph(resumed, pc.attribute(model, builders.prompt(), checkpoint=tmp_path / "other", **options))


def traced(folder: Path, **changes: Any) -> pc.Graph:
    options = {"max_features": 12, "progress": False, "checkpoint": folder, **changes}
    return pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), **options)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"max_features": 13}, "max_features"), ({"targets": [5]}, "targets"), ({"round_size": 4}, "round_size")],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], name: str) -> None:
    traced(tmp_path)
    with pytest.raises(pc.CheckpointError, match=f"differs in {name};"):
        traced(tmp_path, **changes)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    full = traced(tmp_path)
    assert same_graph(full, traced(tmp_path))
    file = sorted(tmp_path.glob("rows-*"))[-1]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(pc.CheckpointError, match=f"got .*{file.name}.*delete it"):
        traced(tmp_path)
    file.unlink()
    assert same_graph(full, traced(tmp_path))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(pc.CheckpointError, match=r"readable run\.json"):
        traced(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(pc.CheckpointError, match=r"run\.json beside its rows"):
        traced(tmp_path)
    with pytest.raises(pc.CheckpointError, match="must be a folder"):
        traced(file)


# Stopping and progress


def test_ctrl_c_returns_the_graph_so_far(monkeypatch: Any) -> None:
    in_small_tiles(monkeypatch)
    model, steps = replacement("llama", "plt", torch.float32), []

    def stop(phase: str, done: int, total: int) -> None:
        steps.append((phase, done, total))
        if done > 30:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    graph = pc.attribute(model, builders.prompt(), progress=stop)
    assert graph.provenance["interrupted"] and 30 < graph.rows.count < steps[-1][2]
    assert graph.certificate < 1e-5
    full = pc.attribute(model, builders.prompt(), progress=False)
    assert torch.equal(graph.row_node, full.row_node[: graph.rows.count]) and not full.provenance["interrupted"]


def test_ctrl_c_while_features_are_labelled() -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if phase == "labels":
            raise KeyboardInterrupt

    model = replacement("llama", "plt", torch.float32)
    graph = pc.attribute(model, builders.prompt(), progress=stop)
    assert not graph.provenance["interrupted"] and not graph.automatic_labels
    assert graph.rows.count == len(graph.features) + len(graph.targets)


def test_ctrl_c_while_rows_are_stored(monkeypatch: Any) -> None:
    """An interrupt between a row's columns and its weights loses that row only."""
    in_small_tiles(monkeypatch)
    append, calls = row_store.GrowableArray.append, []

    def stop(self: Any, values: Any) -> None:
        calls.append(1)
        if len(calls) == 5 * 12 + 2:
            raise KeyboardInterrupt
        append(self, values)

    monkeypatch.setattr(row_store.GrowableArray, "append", stop)
    graph = pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress=False)
    assert graph.provenance["interrupted"] and graph.rows.count > 12 and graph.certificate < 1e-5


def test_a_failed_run_ends_the_terminals_line(monkeypatch: Any) -> None:
    closed = []
    monkeypatch.setattr(Progress, "close", lambda self: closed.append(1))
    monkeypatch.setattr(Sweep, "tile", lambda *_: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress=False)
    assert closed


def test_ctrl_c_before_there_is_anything(monkeypatch: Any) -> None:
    monkeypatch.setattr(Sweep, "tile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress=False)
