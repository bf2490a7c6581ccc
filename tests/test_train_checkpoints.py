"""Training that is stopped and resumed, and training that two processes share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import LAYERS, WIDTH, build
from disks import disk_full
from safetensors.torch import load_file, safe_open, save_file
from training_cases import RECIPE, SHARED_BY, assert_same, corpus, resumable, shared, tensors_of

import pycircuit as pc
from pycircuit.training import Trainer
from pycircuit.training.stream import Stream

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).parent
SCRIPT = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from builders import build
from pycircuit.training import Trainer
from training_cases import corpus, resumable
torch.set_num_threads(1)
trainer = Trainer(build("llama"), corpus(), resumable(sys.argv[3]))
trainer.run(sys.argv[2], every=7, progress=False)
"""


def steps_of(tokens: list[int]) -> Callable[[str, int, int], None]:
    """A report of progress that collects the counts of tokens trained on."""

    def report(phase: str, done: int, total: int) -> None:
        if phase == "training":
            tokens.append(done)

    return report


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "batchtopk"])
def test_a_killed_run_resumes_to_the_same_bits(activation: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    if activation == "topk":  # kill -9 while it runs
        command = [sys.executable, "-c", SCRIPT, str(TESTS), str(path), activation]
        child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 60
        while not path.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    else:

        class Stop(Exception):
            pass

        def stop(phase: str, done: int, total: int) -> None:
            if phase == "training" and done > 0.6 * total:
                raise Stop

        with pytest.raises(Stop):
            Trainer(build("llama"), corpus(), resumable(activation)).run(path, every=7, progress=stop)
    resumed = Trainer(build("llama"), corpus(), resumable(activation))
    tokens_done: list[int] = []
    transcoders = resumed.run(path, every=7, progress=steps_of(tokens_done))
    uninterrupted = Trainer(build("llama"), corpus(), resumable(activation))
    assert_same(uninterrupted.run(progress=False), transcoders)
    assert 0 < tokens_done[0] // RECIPE.batch < 90  # it did not begin again
    assert tokens_done[1] == tokens_done[0] + RECIPE.batch
    assert torch.equal(uninterrupted.measurements, resumed.measurements)
    assert torch.equal(uninterrupted.last_active, resumed.last_active)
    again = Trainer(build("llama"), corpus(), resumable(activation)).run(path, progress=False)
    assert_same(again, transcoders)  # a finished run is read, not repeated


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    recipe = replace(RECIPE, steps=2)
    Trainer(build("llama"), corpus(), recipe).run(path, progress=False)
    with pytest.raises(pc.CheckpointError, match="differs in recipe"):
        Trainer(build("llama"), corpus(), replace(recipe, seed=1)).run(path, progress=False)
    with pytest.raises(pc.CheckpointError, match="differs in texts"):
        Trainer(build("llama"), corpus(39), recipe).run(path, progress=False)
    with pytest.raises(pc.CheckpointError, match="differs in model"):
        Trainer(build("llama", seed=1), corpus(), recipe).run(path, progress=False)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(pc.CheckpointError, match="file of an earlier run"):
        Trainer(build("llama"), corpus(), recipe).run(path, progress=False)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path, recipe = tmp_path / "run.safetensors", replace(RECIPE, steps=2)
    Trainer(build("llama"), corpus(), recipe).run(path, progress=False)
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for offset in (begin, (begin + len(content)) // 2, len(content) - 1):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :])
        with pytest.raises(pc.CheckpointError, match=r"got .*run\.safetensors with another digest; remove it"):
            Trainer(build("llama"), corpus(), recipe).run(path, progress=False)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for run in ("[]", "3", '{"recipe": 1}'):
        save_file(load_file(path), path, {**metadata, "run": run})
        with pytest.raises(pc.CheckpointError, match=r"run\.safetensors"):
            Trainer(build("llama"), corpus(), recipe).run(path, progress=False)


def test_a_full_disk_is_named_with_the_checkpoint(tmp_path: Path) -> None:
    path, recipe = tmp_path / "run.safetensors", replace(RECIPE, steps=2)
    Trainer(build("llama"), corpus(), recipe).run(path, every=1, progress=False)
    before = path.read_bytes()
    path.unlink()
    with disk_full(len(before) - 1), pytest.raises(OSError, match=rf"train: {path} must be possible to write"):
        Trainer(build("llama"), corpus(), recipe).run(path, every=1, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # of the first step, which fitted
    Trainer(build("llama"), corpus(), recipe).run(path, every=1, progress=False)
    assert path.read_bytes() == before


SHARED = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from builders import build
from pycircuit.training import Trainer
from training_cases import SHARED_BY, corpus, shared, tensors_of
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2] + "/meet", rank=int(sys.argv[3]), world_size=2)
for activation in SHARED_BY:
    trainer = Trainer(build("llama"), corpus(), shared(activation))
    transcoders = trainer.run(progress=False)
    result = [trainer.measurements, trainer.last_active, *tensors_of(transcoders)]
    torch.save(result, f"{sys.argv[2]}/{activation}{sys.argv[3]}")
dist.destroy_process_group()
"""


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SHARED, str(TESTS), str(tmp_path)]
    children = [subprocess.Popen([*arguments, str(rank)]) for rank in range(2)]
    assert [child.wait(300) for child in children] == [0, 0]
    for activation in SHARED_BY:
        single = Trainer(build("llama"), corpus(), shared(activation))
        transcoders = single.run(progress=False)
        first, second = (torch.load(tmp_path / f"{activation}{rank}") for rank in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)  # the same weights in both processes
        # Sums in another order, through 24 steps of Adam: 1e-7 grows, a wrong share of the batch would be 1e-1.
        torch.testing.assert_close(first[0][:, 0], single.history.loss, rtol=1e-3, atol=0)
        torch.testing.assert_close(first[0][:, 1 : 1 + LAYERS], single.history.variance, rtol=0, atol=1e-3)
        for a, b in zip(first[2:], tensors_of(transcoders), strict=True):
            assert (a - b).norm() < 0.02 * b.norm()
        assert single.history.loss[-1] < 0.9 * single.history.loss[0]


def test_batches_do_not_depend_on_the_number_of_processes() -> None:
    """Every token of a buffer is in one batch of one process; another buffer has another order."""
    trainer = Trainer(build("llama"), corpus(), RECIPE)
    stream = trainer.stream
    group = next(stream.groups())
    single = stream.buffer(0, group)
    halves = [Stream(trainer.source, stream.sequences, RECIPE, rank, 2).buffer(0, group) for rank in range(2)]
    batches: list[torch.Tensor] = []
    for number in range(stream.batches_in(group)):
        rows, batch_index = single.batch(number, RECIPE.batch)
        assert torch.equal(batch_index, torch.arange(RECIPE.batch))
        joined = torch.empty(LAYERS, RECIPE.batch, WIDTH)
        for half in halves:
            local_rows, local_index = half.batch(number, RECIPE.batch)
            assert 0 < len(local_rows) < RECIPE.batch
            joined[:, local_index] = half.x[:, local_rows]
        torch.testing.assert_close(joined, single.x[:, rows], atol=1e-5, rtol=1e-5)
        batches.append(rows)
    all_rows = torch.cat(batches)
    assert len(all_rows.unique()) == len(all_rows)
    assert not torch.equal(single.order, stream.buffer(1, group).order)
    assert RECIPE.buffer <= single.x.shape[1] < RECIPE.buffer + RECIPE.context
