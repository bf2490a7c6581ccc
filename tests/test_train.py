"""The trainer: gradients against autograd, what is learned and saved, resumed, shared between processes, judged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from builders import CONFIGS, LAYERS, VOCABULARY, WIDTH, build
from disks import disk_full
from safetensors.torch import load_file, safe_open, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import pycircuit as pc
from pycircuit.model.agreement import relative_error
from pycircuit.model.capture import capture
from pycircuit.model.transcoder_hooks import eager_transcoder_hooks
from pycircuit.training import Recipe, Trainer
from pycircuit.training.learner import Learner
from pycircuit.training.sources import source_of
from pycircuit.training.sparse import Entries, above, batch_top_k, decode, values
from pycircuit.training.stream import Stream

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).parent
READS, WRITES = ("resid_mid", "mlp_normed", "mlp_in"), ("mlp_out", "mlp_raw")
POSITIONS, SIZE, SLOTS, BANDWIDTH = 21, 40, 3, 0.6
RECIPE = Recipe(features=64, steps=60, k=6, start=12, batch=64, buffer=512, context=24, warmup=5, rate=3e-3, revive=20)


def leaves(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    made = {
        "x": normal(POSITIONS, WIDTH),
        "w_enc": normal(SIZE, WIDTH) / WIDTH**0.5,
        "b_enc": 0.3 * normal(SIZE),
        "theta": normal(SIZE).abs() + 0.3,
        "w_dec": normal(SLOTS, SIZE, WIDTH),
    }
    return {name: t.requires_grad_() for name, t in made.items()}


class Rectangle(torch.autograd.Function):
    """value * (value > theta), dense, with the derivative by theta that a rectangle gives."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(pre, theta)
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < BANDWIDTH / 2) & (pre > 0)
        return grads[0] * (pre > theta), (-theta / BANDWIDTH * near * grads[0]).sum(0)


def found(rule: str, t: dict[str, torch.Tensor]) -> Entries:
    x, w_enc, b_enc, theta = (t[n].detach() for n in ("x", "w_enc", "b_enc", "theta"))
    if rule == "jumprelu":
        return above(x, w_enc, b_enc, theta, BANDWIDTH)
    if rule == "batchtopk":
        return batch_top_k(x, w_enc, b_enc, 5 * POSITIONS, 0.0)
    return Entries.of(pc.ops.encode(x, w_enc, b_enc, pc.ReLU() if rule == "relu" else pc.TopK(5)), SIZE)


def dense_values(rule: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    pre = t["x"] @ t["w_enc"].T + t["b_enc"]
    if rule == "jumprelu":
        return Rectangle.apply(pre, t["theta"])
    if rule == "relu":
        return pre.relu()
    ranked = pre.flatten() if rule == "batchtopk" else pre
    least = ranked.topk(5 * POSITIONS if rule == "batchtopk" else 5).values[..., -1:]
    return pre * ((pre >= least) & (pre > 0))


def gradients(t: dict[str, torch.Tensor], value: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss that is no sum of squares, and that a penalty on the values is part of."""
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    loss = (weight * out).sum() + 0.1 * out.square().sum() + torch.tanh(0.7 * value).sum()
    used = {name: leaf for name, leaf in t.items() if name != "theta" or leaf.requires_grad}
    grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
    return {name: grad for name, grad in zip(used, grads, strict=True) if grad is not None}


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["reference", "native"])
def test_gradients_are_those_of_the_dense_form(rule: str, dtype: torch.dtype) -> None:
    dense, sparse = leaves(torch.float64), leaves(dtype)
    value = dense_values(rule, dense)
    expected = gradients(dense, value, torch.einsum("pf,sfd->spd", value, dense["w_dec"]))
    entries = found(rule, sparse)
    theta = sparse["theta"] if rule == "jumprelu" else None
    own = values(sparse["x"], sparse["w_enc"], sparse["b_enc"], entries, theta, BANDWIDTH)
    got = gradients(sparse, own, decode(own, sparse["w_dec"], entries))
    assert pc.last_run().implementation == ("reference" if dtype == torch.float64 else "native")
    assert set(got) == set(expected) == set(dense) - ({"theta"} if rule != "jumprelu" else set())
    for name, grad in got.items():
        # float32: sums of up to SLOTS * WIDTH products of size about one, gradients of size about ten.
        error = (grad.double() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < (1e-13 if dtype == torch.float64 else 3e-6), name
        assert expected[name].abs().max() > 0.1


def test_gradients_of_a_plain_sum_and_of_what_is_asked_alone() -> None:
    """A sum's gradient is one number, stretched."""
    for wanted in ("x", "w_enc", "b_enc", "w_dec"):
        sides = []
        for sparse in (False, True):
            t = leaves(torch.float64)
            for name, leaf in t.items():
                leaf.requires_grad_(name == wanted)
            if sparse:
                entries = found("relu", t)
                value = values(t["x"], t["w_enc"], t["b_enc"], entries)
                out = decode(value, t["w_dec"], entries)
            else:
                value = dense_values("relu", t)
                out = torch.einsum("pf,sfd->spd", value, t["w_dec"])
            loss = out.sum() if wanted == "w_dec" else value.sum()
            loss.backward()
            assert all((leaf.grad is None) == (name != wanted) for name, leaf in t.items())
            sides.append(t[wanted].grad)
        torch.testing.assert_close(*sides, rtol=1e-12, atol=1e-12)


def test_jumprelu_thresholds_learn_from_entries_on_both_sides() -> None:
    t = leaves(torch.float64)
    entries = found("jumprelu", t)
    side = entries.pre > t["theta"].detach()[entries.index]
    assert 10 < int(side.sum()) < len(side) - 10


def test_batch_top_k_is_exact_whatever_is_guessed() -> None:
    t = leaves(torch.float32)
    x, w_enc, b_enc = (t[n].detach() for n in ("x", "w_enc", "b_enc"))
    expected = torch.sort((x @ w_enc.T + b_enc).flatten(), descending=True).values[:60].sort().values
    for guess in (0.0, 0.5, float(expected[0]) + 1e-3, 100.0):
        got = batch_top_k(x, w_enc, b_enc, 60, guess)
        torch.testing.assert_close(got.pre.sort().values, expected)
        assert got.row_ptr[-1] == 60
        assert all((got.index[a:b].diff() > 0).all() for a, b in pairwise(got.row_ptr.tolist()))
    every = batch_top_k(x, w_enc, b_enc, POSITIONS * SIZE, 3.0)
    assert len(every.pre) == int((x @ w_enc.T + b_enc > 0).sum())


def corpus(count: int = 40, length: int = 24) -> torch.Tensor:
    """Text with something to learn: a walk over the vocabulary in a few step sizes."""
    g = torch.Generator().manual_seed(2)
    steps = torch.tensor([1, 2, 7])[torch.randint(0, 3, (count, length), generator=g)]
    return (steps.cumsum(1) + torch.randint(0, VOCABULARY, (count, 1), generator=g)) % VOCABULARY


def explained(t: Any, model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Share of variance per layer, from the model's own streams and the public transcoders: no code of the trainer."""
    replacement = pc.ReplacementModel(model, t)
    missed, there = torch.zeros(2, LAYERS)
    for ids in sequences:
        local = replacement.freeze(ids)
        rest = local.errors[:, 1:]
        written = t.reconstruct(local.features, streams(replacement, ids, t.reads), 1)[:, 1:] + rest
        missed += rest.square().sum((1, 2))
        there += written.square().sum((1, 2)) - written.sum(1).square().sum(1) / written.shape[1]
    return 1 - missed / there


def streams(model: pc.ReplacementModel, ids: torch.Tensor, name: str) -> torch.Tensor:
    return capture(model.hf_model, model.family, model.weights, ids, (name,)).streams[name]


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_training_explains_most_of_the_variance(kind: str, activation: str) -> None:
    model = build("llama")
    recipe = replace(RECIPE, kind=kind, activation=activation, steps=100, sparsity=1e-3, skip=activation == "topk")
    trainer = Trainer(model, corpus(), recipe)
    t = trainer.run(progress=False)
    h = trainer.history
    assert type(t) is (pc.PerLayerTranscoders if kind == "plt" else pc.CrossLayerTranscoder)
    assert t.reads == ("mlp_in" if kind == "plt" else "resid_mid")
    assert h.loss.shape == (100,) and h.variance.shape == (100, LAYERS)
    assert h.loss[-1] < 0.6 * h.loss[0]
    if activation in ("topk", "batchtopk"):
        assert (h.active == 6).all()
    # What is saved is what was trained: the last batch's share is the corpus's within what batches differ by.
    saved = explained(t, model, corpus()[:12])
    assert (saved - h.variance[-1]).abs().max() < 0.1
    assert saved.min() > 0.4


PLACES = [("gemma2", reads, writes) for reads in READS for writes in WRITES]
PLACES += [(name, "resid_mid", "mlp_out") for name in CONFIGS if name != "gemma2"]


@pytest.mark.parametrize(("name", "reads", "writes"), PLACES)
def test_what_is_learned_from_is_what_the_capture_sees(name: str, reads: str, writes: str) -> None:
    """Batches of padded prompts against one prompt at a time; and what a hook writes is what the model goes on with."""
    model, sequences = build(name), [torch.tensor(s) for s in ([3, 5, 7, 9, 11, 2], [4, 8, 1, 1, 6, 7, 8, 9, 9])]
    source = source_of("train", model, reads, writes, 1)
    x, y = source.activations(sequences)
    at = 0
    for ids in sequences:
        one = capture(model, source.family, source.weights, ids, (reads, writes)).streams
        end = at + len(ids) - 1
        assert relative_error(x[:, at:end], one[reads][:, 1:]) < 1e-5
        assert relative_error(y[:, at:end], one[writes][:, 1:]) < 1e-5
        at = end
    assert at == x.shape[1]

    def last(change: float | torch.Tensor) -> torch.Tensor:
        """The last layer's input to its MLP when the first layer's output is changed."""
        seen = {}

        def write(layer: int, y: torch.Tensor) -> torch.Tensor | None:
            return y + change if layer == 0 else None

        with eager_transcoder_hooks(model, source.family, source.weights, reads, writes, seen.__setitem__, write):
            model(input_ids=sequences[0][None], use_cache=False)
        assert list(seen) == list(range(LAYERS))
        return seen[LAYERS - 1][0, 1:]

    assert relative_error(last(0.0), x[-1, :5]) < 1e-5
    torch.manual_seed(0)
    assert (last(torch.randn(WIDTH)) - x[-1, :5]).norm() > 0.02 * x[-1, :5].norm()


def bits(t: Any) -> list[torch.Tensor]:
    return [w for name in ("w_enc", "b_enc", "w_dec", "b_dec") for w in getattr(t, name)]


def assert_same(a: Any, b: Any) -> None:
    for one, other in zip(bits(a), bits(b), strict=True):
        assert torch.equal(one, other)


SCRIPT = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import test_train as t
torch.set_num_threads(1)
trainer = t.Trainer(t.build("llama"), t.corpus(), t.resumable(sys.argv[3]))
trainer.run(sys.argv[2], every=7, progress=False)
"""


def resumable(activation: str) -> Recipe:
    """Long enough that it can be killed, with new rows and several buffers on the way."""
    return replace(RECIPE, kind="clt", activation=activation, steps=90, buffer=300, sparsity=3e-3)


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "batchtopk"])
def test_a_killed_run_goes_on_to_the_very_same_bits(activation: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    if activation == "topk":  # kill -9 while it runs
        command = [sys.executable, "-c", SCRIPT, str(TESTS), str(path), activation]
        child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        until = time.monotonic() + 60
        while not path.exists() and child.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    else:

        class Stop(Exception):
            pass

        def stop(_: str, done: int, total: int) -> None:
            if done > 0.6 * total:
                raise Stop

        with pytest.raises(Stop):
            Trainer(build("llama"), corpus(), resumable(activation)).run(path, every=7, progress=stop)
    resumed = Trainer(build("llama"), corpus(), resumable(activation))
    first: list[int] = []
    second = resumed.run(path, every=7, progress=lambda _, done, total: first.append(done))
    whole = Trainer(build("llama"), corpus(), resumable(activation))
    assert_same(whole.run(progress=False), second)
    assert 0 < first[1] // RECIPE.batch - 1 < 90  # it did not begin again
    assert torch.equal(whole.measured, resumed.measured)
    assert torch.equal(whole.heard, resumed.heard)
    again = Trainer(build("llama"), corpus(), resumable(activation)).run(path, progress=False)
    assert_same(again, second)  # a finished run is read, not repeated


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
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # of the first step, which had room
    Trainer(build("llama"), corpus(), recipe).run(path, every=1, progress=False)
    assert path.read_bytes() == before


SHARED = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import test_train as t
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2] + "/meet", rank=int(sys.argv[3]), world_size=2)
for activation in t.SHARED_BY:
    trainer = t.Trainer(t.build("llama"), t.corpus(), t.shared(activation))
    made = trainer.run(progress=False)
    torch.save([trainer.measured, trainer.heard, *t.bits(made)], f"{sys.argv[2]}/{activation}{sys.argv[3]}")
dist.destroy_process_group()
"""
SHARED_BY = ("topk", "jumprelu", "batchtopk")


def shared(activation: str) -> Recipe:
    return replace(RECIPE, activation=activation, steps=24, revive=8, k=3, features=96, sparsity=1e-2)


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SHARED, str(TESTS), str(tmp_path)]
    children = [subprocess.Popen([*arguments, str(rank)]) for rank in range(2)]
    assert [child.wait(90) for child in children] == [0, 0]
    for activation in SHARED_BY:
        one = Trainer(build("llama"), corpus(), shared(activation))
        made = one.run(progress=False)
        first, second = (torch.load(tmp_path / f"{activation}{rank}") for rank in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)  # both hold the same weights
        # Sums in another order, through 24 steps of Adam: 1e-7 grows, a wrong share of the batch would be 1e-1.
        torch.testing.assert_close(first[0][:, 0], one.history.loss, rtol=1e-3, atol=0)
        torch.testing.assert_close(first[0][:, 1 : 1 + LAYERS], one.history.variance, rtol=0, atol=1e-3)
        for a, b in zip(first[2:], bits(made), strict=True):
            assert (a - b).norm() < 0.02 * b.norm()
        assert one.history.loss[-1] < 0.9 * one.history.loss[0]


def test_silent_features_come_back() -> None:
    """With rows that can never win; without revival they stay dead."""
    dead = {}
    for revive in (20, 0):
        trainer = Trainer(build("llama"), corpus(), replace(RECIPE, steps=70, revive=revive))
        with torch.no_grad():
            for b_enc in trainer.learner.b_enc:
                b_enc[:40] = -50
        trainer.run(progress=False)
        heard = trainer.heard[:, :40]
        dead[revive] = float((heard <= 40).double().mean())
    assert dead[0] == 1.0
    assert dead[20] < 0.25


def test_what_batches_hold_does_not_depend_on_processes() -> None:
    """Every token of a buffer in one batch of one process; another buffer, another order."""
    trainer = Trainer(build("llama"), corpus(), RECIPE)
    one = trainer.stream
    group = next(one.groups())
    whole = one.buffer(0, group)
    parts = [Stream(trainer.source, one.sequences, RECIPE, rank, 2).buffer(0, group) for rank in range(2)]
    seen: list[torch.Tensor] = []
    for number in range(one.batches_in(group)):
        rows, places = whole.batch(number, RECIPE.batch)
        assert torch.equal(places, torch.arange(RECIPE.batch))
        both = torch.empty(LAYERS, RECIPE.batch, WIDTH)
        for part in parts:
            mine, at = part.batch(number, RECIPE.batch)
            assert 0 < len(mine) < RECIPE.batch
            both[:, at] = part.x[:, mine]
        torch.testing.assert_close(both, whole.x[:, rows], atol=1e-5, rtol=1e-5)
        seen.append(rows)
    every = torch.cat(seen)
    assert len(every.unique()) == len(every)
    assert not torch.equal(whole.order, one.buffer(1, group).order)
    assert RECIPE.buffer <= whole.x.shape[1] < RECIPE.buffer + RECIPE.context


def test_buffers_are_bounded_in_bytes() -> None:
    recipe = replace(RECIPE, buffer=None)
    assert recipe.held(2 * 30 * 576 * 4) == 7767  # SmolLM2: 1 GiB
    assert recipe.held(1000) == 65536
    assert recipe.held(1 << 29) == recipe.batch  # never less than a batch
    assert RECIPE.held(1 << 29) == RECIPE.buffer


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_features_of_each_layer(kind: str) -> None:
    ks = tuple(range(1, LAYERS + 1))
    made = pc.train(build("llama"), corpus(), features=64, steps=3, k=ks, batch=64, kind=kind, progress=False)
    assert [made.activation[layer] for layer in range(LAYERS)] == [pc.TopK(k) for k in ks]


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_rows_that_begin_as_tokens(kind: str, activation: str) -> None:
    """What is written is right from the first step on, as far as one scale can make it so."""
    recipe = replace(RECIPE, kind=kind, activation=activation, steps=1)
    first = {}
    for rows in ("random", "tokens"):
        trainer = Trainer(build("llama"), corpus(), replace(recipe, rows=rows))
        trainer.run(progress=False)
        first[rows] = trainer.history.variance[0]
    assert (first["tokens"] > first["random"] + 0.05).all(), first
    assert (first["tokens"] >= 0).all()


def test_rows_are_drawn_far_from_each_other() -> None:
    """Of two crowds and three tokens alone, each is drawn before any is drawn twice."""
    recipe = Recipe(features=5, steps=1, k=1)
    learner = Learner(recipe, 1, WIDTH, torch.float64, torch.device("cpu"))
    places = 10 * torch.eye(5, WIDTH, dtype=torch.float64)
    y = torch.cat([places[:1].expand(200, -1), places[1:2].expand(200, -1), places[2:]])[None]
    learner.sow(y + 1, y)
    assert sorted(learner.w_dec[0][0].argmax(1).tolist()) == list(range(5))


def test_schedules() -> None:
    recipe = replace(RECIPE, steps=100, warmup=10, decay=0.2, rate=1.0, sparsity=2.0, sparsity_rise=0.5, revive=30)
    assert [round(recipe.rate_at(s), 3) for s in (0, 4, 9, 50, 80, 90, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05]
    assert [recipe.sparsity_at(s) for s in (0, 25, 50, 99)] == [0.0, 1.0, 2.0, 2.0]
    assert [s for s in range(100) if recipe.revives_at(s)] == [29, 59]


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"kind": "sae"}, "kind must be one of plt, clt, got 'sae'"),
        (ValueError, {"activation": "gelu"}, "activation must be one of"),
        (ValueError, {"features": 0}, "features must be at least 1, got 0"),
        (TypeError, {"steps": 1.5}, "steps must be a whole number"),
        (ValueError, {"buffer": 10}, "buffer must be at least 64, got 10"),
        (ValueError, {"k": 65}, "k must be at most the 64 features, got 65"),
        (ValueError, {"k": (6, 65)}, "k must be at most the 64 features, got 65"),
        (ValueError, {"k": (6,) * (LAYERS + 1)}, f"one for each of the {LAYERS} layers, got"),
        (ValueError, {"rows": "data"}, "rows must be one of random, tokens, got 'data'"),
        (ValueError, {"rate": 0.0}, "rate must be"),
        (ValueError, {"sparsity": float("nan")}, "sparsity must be"),
        (TypeError, {"learning": 1}, "options must be among"),
    ],
)
def test_wrong_options_are_named(error: type[Exception], options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        pc.train(build("llama"), corpus(), **{"features": 64, "batch": 64, "progress": False, **options})


@pytest.mark.parametrize(
    ("error", "texts", "message"),
    [
        (TypeError, "one text", "texts must be a list"),
        (ValueError, ["text"], "tokenizer must be given"),
        (ValueError, [[1, VOCABULARY]], "text 0 must hold ids from 0 to 60"),
        (ValueError, [], "at least one text"),
        (ValueError, [[1]], "longer than the 1 ignored"),
        (TypeError, [[0.5]], "text 0 must be"),
    ],
)
def test_wrong_texts_are_named(error: type[Exception], texts: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pc.train(build("llama"), texts, features=64)


def test_progress_says_how_it_goes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycircuit.progress._INTERVAL", {True: 0.0, False: 0.0})
    pc.train(build("llama"), corpus(), **{**asdict(RECIPE), "steps": 3})
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pycircuit: training: 192 of 192 tokens")
    assert "variance explained" in line and "L0 6.0" in line


def identity(model: Any, kind: str, features: int = 8) -> Any:
    """Transcoders for a model whose MLPs are the linear map x @ w_skip + b: exact, and their features silent."""
    made: dict[str, list[Any]] = {"w_enc": [], "b_enc": [], "w_dec": [], "b_dec": [], "w_skip": []}
    for layer in range(LAYERS):
        mlp = model.model.layers[layer].mlp
        made["w_enc"].append(torch.zeros(features, WIDTH))
        made["b_enc"].append(torch.full((features,), -1.0))
        made["w_dec"].append(torch.ones(features, *(() if kind == "plt" else (LAYERS - layer,)), WIDTH))
        made["b_dec"].append(mlp.bias.detach().clone())
        made["w_skip"].append(mlp.weight.detach().T.clone())
    maker = pc.PerLayerTranscoders if kind == "plt" else pc.CrossLayerTranscoder
    return maker(**made, reads="mlp_in")


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_exact_transcoders_are_judged_exact(kind: str) -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = torch.nn.Linear(WIDTH, WIDTH)
    t = identity(model, kind)
    found = pc.evaluate(model, t, [*corpus(5).tolist(), [1, 2, 3, 4]])
    assert found.tokens == 5 * 23 + 3
    assert min(v for v in found.variance if v is not None) > 1 - 1e-6
    assert found.agreement == 1.0
    assert abs(found.divergence) < 1e-6 < 0.01 < found.ablated
    assert found.active == [0.0] * LAYERS and found.dead == [1.0] * LAYERS
    assert found.density == [[8, 0, 0, 0, 0, 0, 0, 0]] * LAYERS
    t.b_enc[1][:3] = 1.0  # three features of layer 1, always active, write ones: wrong from there on
    wrong = pc.evaluate(model, t, corpus(5))
    assert wrong.active == [0.0, 3.0, 0.0] and wrong.dead == [1.0, 5 / 8, 1.0]
    assert wrong.density[1] == [5, 0, 0, 0, 0, 0, 0, 3]
    assert wrong.variance[1] == pytest.approx(1.0)  # a constant explains and spoils no variance
    assert wrong.divergence > 0.01
    assert "next token agrees" in str(wrong) and str(wrong).count("\n") == LAYERS + 1


def test_evaluation_is_that_of_the_definition() -> None:
    """Against the model with its MLPs replaced by hand, prompt by prompt, from dense products."""
    model = build("gpt2")
    t = pc.train(model, corpus(), **{**asdict(RECIPE), "kind": "clt", "progress": False})
    prompts = corpus(4)
    found = pc.evaluate(model, t, prompts)
    agreed, divergence = 0, 0.0
    for ids in prompts:
        with torch.no_grad():
            own = model(ids[None]).logits[0, 1:].log_softmax(-1)
            other = replaced_by_hand(model, t, ids)[1:].log_softmax(-1)
        agreed += int((own.argmax(-1) == other.argmax(-1)).sum())
        divergence += float((own.exp() * (own - other)).sum())
    assert found.tokens == 4 * 23
    assert found.agreement == agreed / found.tokens
    assert found.divergence == pytest.approx(divergence / found.tokens, rel=1e-3)
    expected = explained_together(t, model, prompts)
    assert found.variance == pytest.approx(expected.tolist(), abs=1e-4)
    replacement = pc.ReplacementModel(model, t)
    assert pc.evaluate(replacement, t, prompts) == found
    traced = pc.evaluate(model, t, prompts, graphs=2, max_features=40)
    scores = [pc.attribute(replacement, ids, max_features=40, progress=False).scores() for ids in prompts[:2]]
    assert traced.graphs == 2
    assert traced.replacement == pytest.approx(sum(s.replacement for s in scores) / 2)
    assert traced.completeness == pytest.approx(sum(s.completeness for s in scores) / 2)
    assert str(traced).count("\n") == LAYERS + 2


def replaced_by_hand(model: Any, t: Any, ids: torch.Tensor) -> torch.Tensor:
    """gpt2 spelled out: [positions, vocabulary]."""
    body, place = model.transformer, torch.arange(len(ids))
    stream, written = body.wte(ids) + body.wpe(place), torch.zeros(LAYERS, len(ids), WIDTH)
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for layer, block in enumerate(body.h):
        stream = stream + block.attn(block.ln_1(stream)[None], attention_mask=mask[None, None])[0][0]
        pre = stream @ t.w_enc[layer].T + t.b_enc[layer]
        value = torch.where(t.activation[layer].active(pre), pre, 0)
        written[layer:] += torch.einsum("pf,fsd->spd", value, t.w_dec[layer])
        out = written[layer] + t.b_dec[layer]
        out[:1] = block.mlp(block.ln_2(stream))[:1]
        stream = stream + out
    return model.lm_head(body.ln_f(stream))


def explained_together(t: Any, model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """The share of variance, missed and there both about their means over all tokens: [layers]."""
    replacement = pc.ReplacementModel(model, t)
    rest = torch.cat([replacement.freeze(ids).errors[:, 1:] for ids in prompts], 1)
    there = torch.cat([streams(replacement, ids, t.writes)[:, 1:] for ids in prompts], 1)
    return 1 - rest.var(1).sum(1) / there.var(1).sum(1)


def test_evaluate_refuses_what_is_no_transcoder() -> None:
    with pytest.raises(TypeError, match="evaluate: transcoders must be"):
        pc.evaluate(build("llama"), None, corpus(1))
    other = pc.train(build("llama"), corpus(), **{**asdict(RECIPE), "steps": 1, "progress": False})
    with pytest.raises(ValueError, match="each of the model's 2 layers"):
        pc.evaluate(build("gpt2", n_layer=2), other, corpus(1))


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_bfloat16_learns_as_float32_does(activation: str) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        recipe = replace(RECIPE, activation=activation, precision=precision, kind="clt", skip=True)
        trainer = Trainer(build("llama"), corpus(), recipe)
        t = trainer.run(progress=False)
        assert t.w_enc[0].dtype == torch.float32
        losses[precision] = trainer.history.loss
    assert not torch.equal(*losses.values())
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.05, atol=0)
    with pytest.raises(TypeError, match="precision must be float32"):
        Trainer(build("llama", torch.float64), corpus(), replace(RECIPE, precision="bfloat16"))


def test_float64_models_train_in_float64() -> None:
    t = Trainer(build("llama", torch.float64), corpus(), replace(RECIPE, steps=3)).run(progress=False)
    assert t.w_enc[0].dtype == torch.float64
    t.check(pc.ReplacementModel(build("llama", torch.float64), t))


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_no_tensor_of_a_step_is_tokens_by_features(kind: str, activation: str) -> None:
    """What encode needs inside is bounded in test_memory; this is every tensor that PyTorch makes."""

    class Largest(TorchDispatchMode):
        seen, calls = 0, 0

        def __torch_dispatch__(self, of: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = of(*args, **(kwargs or {}))
            for t in out if isinstance(out, list | tuple) else (out,):
                if isinstance(t, torch.Tensor):
                    self.seen, self.calls = max(self.seen, t.numel()), self.calls + 1
            return out

    recipe = Recipe(features=1024, k=8, start=8, batch=1024, kind=kind, activation=activation, bandwidth=0.2)
    learner = Learner(recipe, LAYERS, WIDTH, torch.float32, torch.device("cpu"))
    x = torch.randn(LAYERS, recipe.batch, WIDTH, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        learner.open(x)
        found = learner.forward(x)
        (found.recon.square().mean() + 1e-3 * learner.penalty(found)).backward()
    assert all(t.grad is not None for t in learner.tensors().values())
    assert largest.calls > 50
    # The largest are a decoder and its gradient, and the stream of all layers.
    assert largest.seen == LAYERS * max(recipe.features, recipe.batch) * WIDTH < recipe.batch * recipe.features / 8


def test_figures_hold_every_layer(tmp_path: Path) -> None:
    trainer = Trainer(build("llama"), corpus(), replace(RECIPE, steps=5))
    t = trainer.run(progress=False)
    trainer.history.plot(tmp_path / "history.svg")
    pc.evaluate(build("llama"), t, corpus(3)).plot(tmp_path / "evaluation.svg")
    for name, lines in (("history", 1 + 3 * LAYERS), ("evaluation", 2 + LAYERS)):
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        drawn = root.findall(".//{http://www.w3.org/2000/svg}polyline")
        assert len(drawn) == lines
        for line in drawn:
            points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
            assert len(points) in (5, LAYERS, 8)
            assert all(46 <= x <= 254 and 46 <= y <= 154 for x, y in points)


@pytest.mark.parametrize(
    ("rule", "positions"), [("relu", 0), ("relu", 5), ("jumprelu", 0), ("jumprelu", 5), ("topk", 0), ("batchtopk", 5)]
)
def test_nothing_active_has_zero_gradients(rule: str, positions: int) -> None:
    """Also a process that holds no token of a batch."""
    t = {name: leaf.detach() for name, leaf in leaves(torch.float32).items()}
    t["x"], t["b_enc"] = t["x"][:positions], torch.full((SIZE,), -100.0)
    t = {name: leaf.requires_grad_() for name, leaf in t.items()}
    entries = found(rule, t)
    theta = t["theta"] if rule == "jumprelu" else None
    value = values(t["x"], t["w_enc"], t["b_enc"], entries, theta, BANDWIDTH)
    out = decode(value, t["w_dec"], entries)
    assert value.shape == (0,) and out.shape == (SLOTS, positions, WIDTH)
    used = {name: leaf for name, leaf in t.items() if name != "theta" or theta is not None}
    for name, grad in zip(used, torch.autograd.grad(out.sum() + value.sum(), list(used.values())), strict=True):
        assert grad.shape == t[name].shape and not grad.any()


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_two_threads_give_the_same_bits_twice(activation: str) -> None:
    recipe = Recipe(features=512, k=16, start=16, batch=256, kind="clt", activation=activation, bandwidth=0.3)
    x = torch.randn(LAYERS, recipe.batch, WIDTH, generator=torch.Generator().manual_seed(0))

    def gradients_of(seed: int) -> list[torch.Tensor]:
        learner = Learner(replace(recipe, seed=seed), LAYERS, WIDTH, torch.float32, torch.device("cpu"))
        learner.open(x)
        found = learner.forward(x)
        (found.recon - x).square().sum().add(learner.penalty(found)).backward()
        return [t.grad for t in learner.tensors().values()]

    torch.set_num_threads(2)
    try:
        first, second, other = gradients_of(0), gradients_of(0), gradients_of(1)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
