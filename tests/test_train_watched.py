"""Training that is watched, stopped early, continued with other steps, and exported from its checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import LAYERS, build
from training_cases import RECIPE, assert_same, corpus, resumable

import pycircuit as pc
from pycircuit.training import HeldOutPlan, Recipe, Trainer, trainer_state
from pycircuit.training.forecast import fit, outlook
from pycircuit.training.schedule import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = replace(RECIPE, steps=30, decay=0.5, revive=8)  # the rate falls from step 15
TESTS = Path(__file__).parent


def trainer(recipe: Recipe = SHORT) -> Trainer:
    return Trainer(build("llama"), corpus(), recipe)


def stop_after(run: Trainer, steps: int, path: Path, **options: Any) -> None:
    """Run until a number of steps is done and stop as Ctrl-C does between two steps."""

    def report(phase: str, done: int, total: int) -> None:
        if phase == "training" and done == steps * run.recipe.batch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(path, progress=report, **options)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_train_watched import trainer
from training_cases import resumable
torch.set_num_threads(1)
def report(phase, done, total):
    print(phase, done, flush=True)
trainer(resumable("topk")).run(sys.argv[2], every=10**9, progress=report)
"""


def test_ctrl_c_in_a_real_process_leaves_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT, str(TESTS), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as child:
        assert child.stdout is not None
        for line in child.stdout:
            phase, tokens = line.rsplit(maxsplit=1)
            if phase == "training" and int(tokens) >= 3 * RECIPE.batch:
                break
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)
    assert child.returncode not in (0, -signal.SIGKILL)
    saved = pc.from_checkpoint(path)
    run = trainer(resumable("topk"))
    steps = trainer_state.read("test", path, "cpu").steps
    assert 3 <= steps < run.recipe.steps
    stop_after(run, steps, tmp_path / "other")
    assert_same(saved, run.transcoders())


def test_checkpoints_by_time(tmp_path: Path) -> None:
    """Without one due by steps: every minute that has passed is enough, and a kill loses what came after."""
    path, run = tmp_path / "run", trainer()

    class Killed(Exception):
        pass

    def report(phase: str, done: int, total: int) -> None:
        if phase == "training" and done == 6 * SHORT.batch:
            raise Killed

    with pytest.raises(Killed):
        run.run(path, every=1000, minutes=1e-9, progress=report)
    assert len(run.measurements) == 30
    resumed = trainer()
    stop_after(resumed, 7, path)
    assert torch.equal(resumed.measurements[:5], run.measurements[:5])
    path.unlink()
    with pytest.raises(Killed):
        trainer().run(path, every=1000, minutes=60, progress=report)
    assert not path.exists()
    with pytest.raises(ValueError, match="minutes must be positive, got 0"):
        trainer().run(path, minutes=0)


def test_a_checkpoint_can_be_exported(tmp_path: Path) -> None:
    path, run = tmp_path / "run", trainer(replace(SHORT, activation="batchtopk", k=(3,) * LAYERS))
    stop_after(run, 4, path)
    assert_same(pc.from_checkpoint(path), run.transcoders())
    assert pc.from_checkpoint(path).activation[0] == run.transcoders().activation[0]
    finished = trainer(run.recipe).run(path, progress=False)  # a k for each layer resumes too
    assert_same(pc.from_checkpoint(path), finished)
    path.write_bytes(b"nonsense")
    with pytest.raises(pc.CheckpointError, match="from_checkpoint: checkpoint must be a file of an earlier run"):
        pc.from_checkpoint(path)


def test_a_longer_run_goes_on_as_if_it_had_been_planned(tmp_path: Path) -> None:
    """Stopped before the rate falls, a run with more steps is the run with these steps, to the bit."""
    path, longer = tmp_path / "run", replace(SHORT, steps=40)
    stop_after(trainer(), 12, path)
    resumed, planned = trainer(longer), trainer(longer)
    assert_same(resumed.run(path, progress=False), planned.run(progress=False))
    assert torch.equal(resumed.measurements, planned.measurements)


@pytest.mark.parametrize("steps", [60, 33, 31])
def test_a_finished_run_goes_on_without_a_jump(tmp_path: Path, steps: int) -> None:
    path, run = tmp_path / "run", trainer()
    run.run(path, progress=False)
    resumed = trainer(replace(SHORT, steps=steps))
    resumed.run(path, progress=False)
    assert resumed.steps_done == steps and torch.equal(resumed.measurements[:30], run.measurements)
    after = resumed.measurements[30:, 0]
    assert after.max() < 1.3 * run.measurements[-1, 0] and (steps < 60 or after[-1] < run.measurements[-1, 0])


def test_schedules_of_other_steps_do_not_jump() -> None:
    recipe = Recipe(features=64, steps=100, k=4, rate=1.0, warmup=10, decay=0.2, sparsity=2.0, sparsity_rise=0.5)
    for stopped in (5, 50, 90, 100):
        for steps in (stopped + 1, 95 if stopped < 95 else 101, 400):
            before = Schedule(recipe)
            after = before.changed(replace(recipe, steps=steps), stopped)
            rates = [before.rate_at(s) for s in range(stopped)] + [after.rate_at(s) for s in range(stopped, steps)]
            weights = [before.sparsity_at(s) for s in range(stopped)]
            weights += [after.sparsity_at(s) for s in range(stopped, steps)]
            rise = max(1 / recipe.warmup, 0.05) + 1e-9
            assert all(b - a <= rise for a, b in pairwise(rates)), (stopped, steps)
            assert all(0 < rate <= 1 for rate in rates)
            assert all(b >= a - 1e-9 for a, b in pairwise(weights)), (stopped, steps)
            assert rates[-1] <= max(1 / after.falling, 0.2) + 1e-9
            again = after.changed(replace(recipe, steps=steps), stopped)  # resumed once more with these steps
            assert (again.start, again.rate) == (after.start, after.rate)


def test_fewer_steps(tmp_path: Path) -> None:
    path = tmp_path / "run"
    stop_after(trainer(), 12, path)
    with pytest.raises(pc.CheckpointError, match=r"steps must be at least the 12 of the checkpoint .*, got 11"):
        trainer(replace(SHORT, steps=11)).run(path, progress=False)
    shorter = trainer(replace(SHORT, steps=16))
    shorter.run(path, progress=False)
    assert shorter.steps_done == 16 and shorter.schedule.rate_at(15) < 0.3 * SHORT.learning_rate


def test_the_field_that_differs_is_named(tmp_path: Path) -> None:
    path, recipe = tmp_path / "run", replace(SHORT, steps=2)
    trainer(recipe).run(path, progress=False)
    with pytest.raises(pc.CheckpointError, match=r"differs in recipe\.k \(6 there, 5 now\), recipe\.seed \(0 there, 1"):
        trainer(replace(recipe, seed=1, k=5)).run(path, progress=False)
    with pytest.raises(pc.CheckpointError, match=r"differs in ignore \(1 there, 2 now\)"):
        Trainer(build("llama"), corpus(), recipe, ignore_positions=2).run(path, progress=False)


def test_held_out_measures_are_those_of_evaluate(tmp_path: Path) -> None:
    """And survive a stop: the resumed run has the whole curve."""
    path, unseen, plan = tmp_path / "run", corpus(50)[40:], HeldOutPlan(corpus(50)[40:], every=5)
    run = trainer()
    transcoders = run.run(progress=False, held_out=plan)
    expected = pc.evaluate(build("llama"), transcoders, unseen, progress=False)
    curve = run.history.held_out
    assert curve.steps.tolist() == [5, 10, 15, 20, 25, 30]
    torch.testing.assert_close(curve.variance[-1], torch.tensor(expected.variance).double(), atol=1e-4, rtol=0)
    assert curve.agreement[-1] == pytest.approx(expected.agreement, abs=1e-9)
    assert curve.variance[-1].mean() > curve.variance[0].mean()
    stop_after(trainer(), 12, path, held_out=plan)
    resumed = trainer()
    resumed.run(path, progress=False, held_out=plan)
    assert torch.equal(resumed.held_out, run.held_out)
    resumed.history.plot(tmp_path / "history.svg")
    assert "held-out variance" in (tmp_path / "history.svg").read_text()


def test_patience_stops_a_run_that_learns_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plan = tmp_path / "run", HeldOutPlan(corpus(50)[40:], every=2, patience=2)
    idle = replace(SHORT, rate=1e-12, steps=200)
    run = trainer(idle)
    stopped = run.run(path, held_out=plan)
    printed = capsys.readouterr().err
    assert run.steps_done == 6 and "stopping early" in printed and "next token agrees" in printed
    assert_same(trainer(idle).run(path, progress=False, held_out=plan), stopped)  # it does not go on by itself
    with pytest.raises(ValueError, match="patience of held-out text must be at least 1, got 0"):
        HeldOutPlan(corpus(), patience=0)


def test_nothing_is_silent_before_the_first_step() -> None:
    """Activations, held-out text and initial rows report their progress."""
    phases: list[tuple[str, int, int]] = []
    recipe = replace(SHORT, steps=1, rows="tokens")
    plan = HeldOutPlan(corpus(50)[40:])
    trainer(recipe).run(progress=lambda *counts: phases.append(counts), held_out=plan)
    names = list(dict.fromkeys(name for name, _, _ in phases))
    expected = ["training", "held-out activations", "held-out next tokens", "activations", "initial rows", "evaluating"]
    assert names == expected
    for name in expected[1:]:
        counts = [(done, total) for phase, done, total in phases if phase == name]
        assert counts[0][0] == 0 or name == "held-out next tokens", name
        assert len(counts) > 1 and counts[-1][0] >= counts[-1][1] - 1, (name, counts)


def test_a_fitted_curve_says_what_more_tokens_bring() -> None:
    tokens = [1000 * 2**i for i in range(8)]
    measured = [0.8 - 5 * t**-0.4 for t in tokens]
    curve = fit(tokens, measured)
    assert curve is not None and curve.error < 1e-6
    assert curve.value(1e6) == pytest.approx(0.8 - 5 * 1e6**-0.4, abs=1e-4)
    sentence = outlook(tokens, measured, 100.0, "the share")
    assert sentence is not None and "extrapolated by the fitted curve" in sentence and "360,000 tokens" in sentence
    expected = 0.8 - 5 * (tokens[-1] + 360_000) ** -0.4
    assert f"to about {expected:.3f}" in sentence
    assert fit(tokens[:3], measured[:3]) is None and outlook(tokens, measured, None, "the share") is None
    steep = fit(tokens, [0.1 * i for i in range(8)])
    assert steep is not None and steep.limit <= 1 and fit(tokens, [-t for t in tokens]) is None


def test_a_recipe_of_before_a_field_was_there_has_its_default() -> None:
    now = asdict(RECIPE)
    before = {name: value for name, value in now.items() if name != "forward"}
    assert trainer_state._differences({"recipe": before}, {"recipe": now}) == []
    changed = trainer_state._differences({"recipe": before}, {"recipe": {**now, "forward": "bfloat16"}})
    assert changed == ["recipe.forward (float32 there, bfloat16 now)"]
