"""How a trace runs: within a bound, resumed after a kill, stopped by hand, many at a time."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import replacement

import pycircuit as pc
from pycircuit.bench import memory, models
from pycircuit.bench.shapes import Shape
from pycircuit.files.sizes import parse_bytes
from pycircuit.progress import Progress
from pycircuit.trace import memory_plan, row_store
from pycircuit.trace.estimate import sample
from pycircuit.trace.memory_model import MemoryModel
from pycircuit.trace.sweep import Sweep
from pycircuit.training.evaluate import replaced_logits

pytestmark = pytest.mark.usefixtures("one_thread")
TESTS = Path(__file__).parent


def same(a: pc.Graph, b: pc.Graph) -> bool:
    """Bit for bit, timings aside."""
    pairs = [
        (getattr(a, n), getattr(b, n)) for n in ("features", "values", "row_node", "bias", "dropped", "preactivation")
    ]
    pairs += [(getattr(a.rows, n), getattr(b.rows, n)) for n in ("row_ptr", "column", "weight")]
    return all(torch.equal(x, y) for x, y in pairs)


def in_small_tiles(monkeypatch: pytest.MonkeyPatch, targets: int = 3) -> None:
    monkeypatch.setattr(Sweep, "fitting", lambda self, layer, *_: min(targets, len(layer)))


# Memory


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("1.5 MB", 1_500_000), ("64k", 64_000), ("7", 7), (9, 9)]
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("bad", ["", "8 apples", "-1", "0", 0, -5, True, 1.5, []])
def test_sizes_that_are_none(bad: Any) -> None:
    with pytest.raises(ValueError, match="memory must be bytes or a size such as '8GiB'"):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), memory=bad, progress=False)


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("max_features", [None, 40])
def test_rows_that_do_not_fit_keep_their_largest(kind: str, max_features: int | None, monkeypatch: Any) -> None:
    """What is left out is counted exactly: the law holds with `dropped`, and every kept entry is the full one."""
    model, ids = replacement("llama", kind, torch.float32), builders.prompt()
    full = pc.attribute(model, ids, max_features=max_features, progress=False)
    assert full.provenance["keep"] is None and not full.dropped_mass.any()
    monkeypatch.setattr(memory_plan, "FEWEST", 8)
    work = sample(model, torch.as_tensor(ids), max_features, 10).work
    memory = MemoryModel(model, work, True)
    bound = memory_plan.least(model, work) + (memory.packed(None) - memory.packed(8)) // 4
    cut = pc.attribute(model, ids, max_features=max_features, memory=bound, progress=False)
    keep = cut.provenance["keep"]
    assert 8 <= keep < full.rows.lengths().max() and cut.rows.lengths().max() == keep
    assert cut.certificate < 1e-5 and float(cut.dropped_mass.min()) >= 0 < float(cut.dropped_mass.max())
    rows = {int(n): r for r, n in enumerate(full.row_node)}
    truth, at = full.dense(), cut.row_node.tolist()
    assert [n for n in at if n not in rows] == [] or max_features is not None
    common = [r for r, n in enumerate(at) if n in rows]
    for r in common:
        column, weight = cut.rows.row(r)
        torch.testing.assert_close(weight, truth[at[r]][column.long()], rtol=1e-5, atol=1e-6)
        assert weight.abs().min() >= truth[at[r]].abs().topk(keep + 1).values[-1] - 1e-6


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
    found = pc.estimate(model, ids, max_features=max_features, max_targets=3)
    graph = pc.attribute(model, ids, max_features=max_features, max_targets=3, progress=False)
    assert found.features == len(graph.features) and found.columns == graph.first_target
    assert abs(found.rows - graph.rows.count) <= 3
    assert found.bytes == sum(found.plan.needs.values()) <= found.plan.memory and found.seconds > 0
    assert f"{len(ids)} positions" in str(found) and "GFLOP" in str(found)


def test_packed_rows_rank_as_dense_rows(monkeypatch: Any) -> None:
    model, ids = replacement("llama", "plt", torch.float32), builders.prompt()
    dense = pc.attribute(model, ids, max_features=24, round_size=6, progress=False)
    monkeypatch.setattr(MemoryModel, "dense", lambda self: 1 << 60)
    packed = pc.attribute(model, ids, max_features=24, round_size=6, progress=False)
    assert same(dense, packed)


SHAPE = Shape("bounded", 4, 128, 4, 2, 32, 4096, 32, 256, 256, "cpu")


@pytest.mark.parametrize("max_features", [64, 400])
def test_a_run_stays_within_its_bound(max_features: int) -> None:
    """Measured from outside, by the system: dense rows, packed rows, rows cut to their largest."""
    model, ids = models.replacement(SHAPE), models.prompt(SHAPE.positions)
    pc.attribute(model, ids[:16], max_features=8, progress=False)  # libraries take their share once
    needed, kept = pc.estimate(model, ids, max_features=max_features).bytes, []
    smallest = memory_plan.least(model, sample(model, ids, max_features, 10).work)
    for bound in (needed, int(0.6 * needed), smallest):
        before = memory.restart_peak()
        graph = pc.attribute(model, ids, max_features=max_features, memory=bound, progress=False)
        assert memory.peak() - before <= 1.05 * bound
        assert graph.certificate < 1e-5
        kept.append(graph.provenance["keep"])
    assert kept[0] is None and kept[2] is not None


def test_out_of_memory_halves_the_tile(monkeypatch: Any) -> None:
    model, ids, sizes = replacement("llama", "plt", torch.float32), builders.prompt(), []
    whole = pc.attribute(model, ids, progress=False)
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
    assert max(sizes) > 20 >= sizes[-1] and graph.rows.count == whole.rows.count
    torch.testing.assert_close(graph.dense(), whole.dense(), rtol=1e-5, atol=1e-5)


def test_other_errors_pass(monkeypatch: Any) -> None:
    monkeypatch.setattr(Sweep, "tile", lambda *_: (_ for _ in ()).throw(RuntimeError("no such thing")))
    with pytest.raises(RuntimeError, match="no such thing"):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress=False)


# Checkpoints


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import torch, builders
torch.set_num_threads(1)
from builders import replacement
import pycircuit as pc
from pycircuit.trace.sweep import Sweep
Sweep.fitting = lambda self, layer, *_: min(3, len(layer))
steps = []
def slowly(phase, done, total):
    if phase == "sweep" and done:
        print(done, total, flush=True)
        time.sleep({pause})
model = replacement("llama", "clt", torch.float32)
graph = pc.attribute(model, builders.prompt(), max_features=60, round_size=9, progress=slowly, checkpoint={folder!r})
graph.save({out!r})
"""


def script(folder: Path, out: Path, pause: float) -> list[str]:
    text = SCRIPT.format(tests=str(TESTS), folder=str(folder), out=str(out), pause=pause)
    return [sys.executable, "-c", text]


def test_a_killed_run_goes_on_to_the_identical_graph(tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "resumed.safetensors"
    with subprocess.Popen(script(folder, out, 0.2), stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if int(line.split()[0]) > 20:
                break
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL and not out.exists()
    files = {f.name: f.stat().st_mtime_ns for f in folder.glob("rows-*")}
    assert len(files) > 5
    done = subprocess.run(script(folder, out, 0.0), capture_output=True, text=True, check=True)
    resumed = pc.Graph.load(out)
    assert len(done.stdout.splitlines()) > len(files)
    assert all((folder / name).stat().st_mtime_ns == when for name, when in files.items())  # read, not found again
    subprocess.run(script(tmp_path / "other", tmp_path / "whole.safetensors", 0.0), capture_output=True, check=True)
    assert same(resumed, pc.Graph.load(tmp_path / "whole.safetensors"))


def traced(folder: Path, **changes: Any) -> pc.Graph:
    how = {"max_features": 12, "progress": False, "checkpoint": folder, **changes}
    return pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), **how)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"max_features": 13}, "max_features"), ({"targets": [5]}, "targets"), ({"round_size": 4}, "round_size")],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    traced(tmp_path)
    with pytest.raises(pc.CheckpointError, match=f"differs in {named};"):
        traced(tmp_path, **changes)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    whole = traced(tmp_path)
    assert same(whole, traced(tmp_path))
    file = sorted(tmp_path.glob("rows-*"))[-1]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(pc.CheckpointError, match=f"got .*{file.name}.*delete it"):
        traced(tmp_path)
    file.unlink()
    assert same(whole, traced(tmp_path))
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
    model, said = replacement("llama", "plt", torch.float32), []

    def stop(phase: str, done: int, total: int) -> None:
        said.append((phase, done, total))
        if done > 30:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    graph = pc.attribute(model, builders.prompt(), progress=stop)
    assert graph.provenance["interrupted"] and 30 < graph.rows.count < said[-1][2]
    assert graph.certificate < 1e-5
    whole = pc.attribute(model, builders.prompt(), progress=False)
    assert torch.equal(graph.row_node, whole.row_node[: graph.rows.count]) and not whole.provenance["interrupted"]


def test_ctrl_c_while_rows_are_put_away(monkeypatch: Any) -> None:
    """Between a row's columns and its weights: the row is not there, those before it are."""
    in_small_tiles(monkeypatch)
    append, calls = row_store.Growing.append, []

    def stop(self: Any, values: Any) -> None:
        calls.append(1)
        if len(calls) == 5 * 12 + 2:
            raise KeyboardInterrupt
        append(self, values)

    monkeypatch.setattr(row_store.Growing, "append", stop)
    graph = pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress=False)
    assert graph.provenance["interrupted"] and graph.rows.count > 12 and graph.certificate < 1e-5


def test_a_failed_run_leaves_the_terminals_line(monkeypatch: Any) -> None:
    closed = []
    monkeypatch.setattr(Progress, "close", lambda self: closed.append(1))
    monkeypatch.setattr(Sweep, "tile", lambda *_: (_ for _ in ()).throw(ValueError("broken")))
    with pytest.raises(ValueError, match="broken"):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress=False)
    assert closed


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing(name: str) -> None:
    model, prompt = replacement("llama", "plt", torch.float32), builders.prompt()
    change, direction = [pc.Intervention(1, 3, 5, 4.0)], torch.arange(model.width) / model.width
    targets = [("a", 1.0, direction), ("b", 0.3, direction - 0.7)]

    def everything() -> list[Any]:
        graph = pc.attribute(model, prompt, targets, max_features=20, progress=False)
        after = pc.intervene(model, prompt, change)
        found = [f.value for layers in model.activations([prompt, prompt[:5]]) for f in layers]
        tensors = [graph.rows.weight, graph.row_node, graph.values, after.logits, after.probabilities, *found]
        return [*tensors, replaced_logits(model, model.tokens(prompt)[None]), *pc.generate(model, [prompt], change)]

    expected = everything()
    with SURROUNDINGS[name]():
        assert pc.ReplacementModel(model.hf_model, model.transcoders).depth == model.depth
        got = everything()
        assert torch.is_autocast_enabled("cpu") == (name == "autocast")
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def test_targets_keep_their_weights_in_the_ranking(monkeypatch: Any) -> None:
    """To the model's own precision, whatever torch's default is."""
    model, seen, influence = replacement("llama", "plt", torch.float64), [], row_store.Store.influence
    monkeypatch.setattr(row_store.Store, "influence", lambda self, order, node, weight: (
        seen.append(weight[0].item()), influence(self, order, node, weight))[1])  # fmt: skip
    with default_dtype(torch.bfloat16):
        target = ("a", 1 / 3, torch.ones(model.width, dtype=torch.float64))
        pc.attribute(model, builders.prompt(), [target], max_features=9, progress=False)
    assert set(seen) == {1 / 3}


def test_ctrl_c_before_there_is_anything(monkeypatch: Any) -> None:
    monkeypatch.setattr(Sweep, "tile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress=False)


def test_progress_names_the_phase_and_the_rate() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, mark in ((Terminal(), "\r"), (io.StringIO(), "pycircuit: ")):
        progress = Progress(True, stream)
        progress.step("sweep", 0, 50)
        assert not stream.getvalue()  # a short run is silent
        progress.next = 0.0
        progress.begun -= 2.0
        progress.step("sweep", 10, 50)
        progress.close()
        text = stream.getvalue()
        assert text.startswith(mark) and "sweep: 10 of 50 rows, 5 rows/s, 8 s left" in text and text.endswith("\n")


def test_progress_must_be_something() -> None:
    with pytest.raises(TypeError, match="progress must be True, False or a function"):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), progress="yes")


# Many prompts


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_many_prompts_in_order(workers: int | None) -> None:
    model, threads = replacement("llama", "plt", torch.float32), torch.get_num_threads()
    prompts = [builders.prompt(n) for n in (9, 4, 13, 6, 11)]
    graphs = list(pc.attribute_many(model, prompts, workers=workers, max_features=10, progress=False))
    assert torch.get_num_threads() == threads
    for prompt, graph in zip(prompts, graphs, strict=True):
        alone = pc.attribute(model, prompt, max_features=10, progress=False)
        assert graph.tokens.ids.tolist() == list(prompt) and torch.equal(graph.row_node, alone.row_node)
        torch.testing.assert_close(graph.dense(), alone.dense(), rtol=1e-5, atol=1e-5)


def test_many_prompts_run_what_was_forced_and_can_be_left() -> None:
    model = replacement("llama", "plt", torch.float64)
    with pc.use("reference"):
        graphs = pc.attribute_many(model, [builders.prompt(5)] * 6, max_features=3, progress=False)
        assert next(graphs).certificate < 1e-10
    graphs.close()  # type: ignore[attr-defined]


def test_threads_share_one_model_through_several_objects() -> None:
    """Hooks see every forward of the model, so that only one may run, through whatever object."""
    first = replacement("llama", "plt", torch.float32)
    second = pc.ReplacementModel(first.hf_model, first.transcoders)
    assert first.forward_lock is second.forward_lock
    prompts = [torch.as_tensor(builders.prompt()).roll(n) for n in range(4)]
    expected = [(first.freeze(p).errors, replaced_logits(first, p[None])) for p in prompts]

    def run(n: int) -> bool:
        model, (errors, logits) = (first, second)[n % 2], expected[n % 4]
        if n % 3:
            return torch.equal(model.freeze(prompts[n % 4]).errors, errors)
        return torch.equal(replaced_logits(model, prompts[n % 4][None]), logits)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, range(60)))


def test_many_prompts_are_checked_first() -> None:
    model = replacement("llama", "plt", torch.float32)
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt must hold ids from 0 to 60, got 61"):
        pc.attribute_many(model, [[1, 2], [3, 61]])
    with pytest.raises(TypeError, match="list of prompts"):
        pc.attribute_many(model, "text")
    with pytest.raises(ValueError, match="workers must be an int of at least 1, got 0"):
        pc.attribute_many(model, [[1, 2]], workers=0)
    with pytest.raises(ValueError, match="checkpoint"):
        pc.attribute_many(model, [[1, 2]], checkpoint="x")
    assert list(pc.attribute_many(model, [])) == []
