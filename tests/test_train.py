"""Training: explained variance, activations, buffers, schedules, options, precision and figures."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from xml.etree import ElementTree

import pytest
import torch
from builders import CONFIGS, LAYERS, VOCABULARY, WIDTH, build
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import RECIPE, corpus, explained
from typing_extensions import Unpack

import pycircuit as pc
from pycircuit.model.agreement import relative_error
from pycircuit.model.capture import capture
from pycircuit.model.transcoder_hooks import eager_transcoder_hooks
from pycircuit.ops.dispatch import multiplies_bfloat16
from pycircuit.training import Recipe, Trainer
from pycircuit.training.learner import Learner
from pycircuit.training.recipe import RecipeOptions
from pycircuit.training.sources import source_of

pytestmark = pytest.mark.usefixtures("one_thread")

READS, WRITES = ("resid_mid", "mlp_normed", "mlp_in"), ("mlp_out", "mlp_raw")


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
    assert h.loss[-1] < (0.7 if recipe.skip else 0.6) * h.loss[0]  # a linear path begins as a regression
    if activation in ("topk", "batchtopk"):
        assert (h.active == 6).all()
    # What is saved is what was trained: the last batch's share is the corpus's within what batches differ by.
    saved = explained(t, model, corpus()[:12])
    assert (saved - h.variance[-1]).abs().max() < 0.1
    assert saved.min() > (0.6 if recipe.skip else 0.4)


SITES = [("gemma2", reads, writes) for reads in READS for writes in WRITES]
SITES += [(name, "resid_mid", "mlp_out") for name in CONFIGS if name != "gemma2"]


@pytest.mark.parametrize(("name", "reads", "writes"), SITES)
def test_activations_equal_those_of_the_capture(name: str, reads: str, writes: str) -> None:
    """Padded batches against one prompt at a time; the value that a hook returns reaches the later layers."""
    model, sequences = build(name), [torch.tensor(s) for s in ([3, 5, 7, 9, 11, 2], [4, 8, 1, 1, 6, 7, 8, 9, 9])]
    source = source_of("train", model, reads, writes, 1)
    x, y = source.activations(sequences)
    begin = 0
    for ids in sequences:
        captured = capture(model, source.family, source.weights, ids, (reads, writes)).streams
        end = begin + len(ids) - 1
        assert relative_error(x[:, begin:end], captured[reads][:, 1:]) < 1e-5
        assert relative_error(y[:, begin:end], captured[writes][:, 1:]) < 1e-5
        begin = end
    assert begin == x.shape[1]

    def last_input(change: float | torch.Tensor) -> torch.Tensor:
        """Input of the last MLP when the first layer's output is changed."""
        inputs = {}

        def write(layer: int, y: torch.Tensor) -> torch.Tensor | None:
            return y + change if layer == 0 else None

        with eager_transcoder_hooks(model, source.family, source.weights, reads, writes, inputs.__setitem__, write):
            model(input_ids=sequences[0][None], use_cache=False)
        assert list(inputs) == list(range(LAYERS))
        return inputs[LAYERS - 1][0, 1:]

    assert relative_error(last_input(0.0), x[-1, :5]) < 1e-5
    torch.manual_seed(0)
    assert (last_input(torch.randn(WIDTH)) - x[-1, :5]).norm() > 0.02 * x[-1, :5].norm()


def test_silent_features_are_revived() -> None:
    """Features with a very negative bias stay dead without revival."""
    dead = {}
    for revive in (20, 0):
        trainer = Trainer(build("llama"), corpus(), replace(RECIPE, steps=70, revive=revive))
        with torch.no_grad():
            for b_enc in trainer.learner.b_enc:
                b_enc[:40] = -50
        trainer.run(progress=False)
        dead[revive] = float((trainer.last_active[:, :40] <= 40).double().mean())
    assert dead[0] == 1.0
    assert dead[20] < 0.25


def test_buffers_are_bounded_in_bytes() -> None:
    recipe = replace(RECIPE, buffer=None)
    assert recipe.buffer_tokens(2 * 30 * 576 * 4) == 7767  # SmolLM2: 1 GiB
    assert recipe.buffer_tokens(1000) == 65536
    assert recipe.buffer_tokens(1 << 29) == recipe.batch  # never less than a batch
    assert RECIPE.buffer_tokens(1 << 29) == RECIPE.buffer


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_k_of_each_layer(kind: str) -> None:
    ks = tuple(range(1, LAYERS + 1))
    trained = pc.train(build("llama"), corpus(), features=64, steps=3, k=ks, batch=64, kind=kind, progress=False)
    assert [trained.activation[layer] for layer in range(LAYERS)] == [pc.TopK(k) for k in ks]


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_rows_that_begin_as_tokens(kind: str, activation: str) -> None:
    """The first step explains more variance than with random rows."""
    recipe = replace(RECIPE, kind=kind, activation=activation, steps=1)
    first = {}
    for rows in ("random", "tokens"):
        trainer = Trainer(build("llama"), corpus(), replace(recipe, rows=rows))
        trainer.run(progress=False)
        first[rows] = trainer.history.variance[0]
    assert (first["tokens"] > first["random"] + 0.05).all(), first
    assert (first["tokens"] >= 0).all()


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_what_transcoders_read_can_keep_its_mean(kind: str) -> None:
    """The set that is saved is the one that was trained."""
    model = build("llama")
    trainer = Trainer(model, corpus(), replace(RECIPE, kind=kind, steps=100, centre=False))
    saved = explained(trainer.run(progress=False), model, corpus()[:12])
    assert trainer.scales is not None
    x, y = trainer.scales
    assert not x.mean.any() and y.mean.abs().min() > 0 and x.scale.min() > 0
    assert saved.min() > 0.4 and (saved - trainer.history.variance[-1]).abs().max() < 0.1


def test_rows_are_drawn_far_from_each_other() -> None:
    """Two large clusters and three single tokens: each is drawn once before any is drawn twice."""
    recipe = Recipe(features=5, steps=1, k=1)
    learner = Learner(recipe, 1, WIDTH, torch.float64, torch.device("cpu"))
    centres = 10 * torch.eye(5, WIDTH, dtype=torch.float64)
    y = torch.cat([centres[:1].expand(200, -1), centres[1:2].expand(200, -1), centres[2:]])[None]
    learner.rows_from_tokens(y + 1, y)
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


def test_keyword_arguments_are_the_fields_of_the_recipe() -> None:
    """The types too, so that a type checker refuses a misspelt option of pc.train."""
    fields = get_type_hints(Recipe)
    assert fields.pop("features") is int
    assert get_type_hints(RecipeOptions) == fields
    options = get_type_hints(pc.train)["options"]
    assert get_origin(options) is Unpack and get_args(options) == (RecipeOptions,)


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


def test_progress_shows_the_measurements(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycircuit.progress._INTERVAL", {True: 0.0, False: 0.0})
    pc.train(build("llama"), corpus(), **{**asdict(RECIPE), "steps": 3})
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pycircuit: training: 192 of 192 tokens")
    assert "variance explained" in line and "L0 6.0" in line


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


@pytest.mark.parametrize("family", CONFIGS)
def test_a_forward_in_bfloat16_learns_as_one_in_float32_does(family: str) -> None:
    """Products of half the bits in the model, of all families; the activations stay in float32 beside them."""
    losses = {}
    for forward in ("float32", "bfloat16"):
        trainer = Trainer(build(family), corpus(), replace(RECIPE, steps=20, forward=forward))
        trainer.run(progress=False)
        losses[forward] = trainer.history.loss
        assert trainer.source.precision == "float32"  # of what evaluates it
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.05, atol=0)
    assert torch.equal(*losses.values()) != multiplies_bfloat16()


@pytest.mark.parametrize("family", CONFIGS)
def test_models_in_bfloat16_are_read(family: str) -> None:
    """Windows, softcaps and sinks have attention of ours, whose output is of the model's type again."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        source = source_of("train", build(family, dtype), "mlp_in", "mlp_out", None)
        results.append(source.activations([torch.arange(1, 20)]))
    for exact, rounded in zip(*results, strict=True):
        assert exact.dtype == rounded.dtype == torch.float32
        assert relative_error(rounded, exact) < 0.1


def test_a_forward_in_bfloat16_says_where_it_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pc.use("native", isa="baseline"):
        pc.train(build("llama"), corpus(), **{**asdict(RECIPE), "steps": 1, "forward": "bfloat16"})
    assert "the model's forward is in float32, this processor does not multiply bfloat16" in capsys.readouterr().err
    with pytest.raises(TypeError, match="forward must be float32 where the model is float64"):
        Trainer(build("llama", torch.float64), corpus(), replace(RECIPE, forward="bfloat16"))


def test_float64_models_train_in_float64() -> None:
    t = Trainer(build("llama", torch.float64), corpus(), replace(RECIPE, steps=3)).run(progress=False)
    assert t.w_enc[0].dtype == torch.float64
    t.check(pc.ReplacementModel(build("llama", torch.float64), t))


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_no_tensor_of_a_step_is_tokens_by_features(kind: str, activation: str) -> None:
    """Every tensor that PyTorch makes; memory inside encode is bounded in test_memory."""

    class Largest(TorchDispatchMode):
        numel, calls = 0, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, list | tuple) else (out,):
                if isinstance(t, torch.Tensor):
                    self.numel, self.calls = max(self.numel, t.numel()), self.calls + 1
            return out

    recipe = Recipe(features=1024, k=8, start=8, batch=1024, kind=kind, activation=activation, bandwidth=0.2)
    learner = Learner(recipe, LAYERS, WIDTH, torch.float32, torch.device("cpu"))
    x = torch.randn(LAYERS, recipe.batch, WIDTH, generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        learner.set_thresholds(x)
        forward = learner.forward(x)
        (forward.recon.square().mean() + 1e-3 * learner.penalty(forward)).backward()
    assert all(t.grad is not None for t in learner.tensors().values())
    assert largest.calls > 50
    # The largest are a decoder and its gradient, and the stream of all layers.
    assert largest.numel == LAYERS * max(recipe.features, recipe.batch) * WIDTH < recipe.batch * recipe.features / 8


def test_figures_show_every_layer(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_two_threads_give_the_same_bits_twice(activation: str) -> None:
    recipe = Recipe(features=512, k=16, start=16, batch=256, kind="clt", activation=activation, bandwidth=0.3)
    x = torch.randn(LAYERS, recipe.batch, WIDTH, generator=torch.Generator().manual_seed(0))

    def gradients_of(seed: int) -> list[torch.Tensor]:
        learner = Learner(replace(recipe, seed=seed), LAYERS, WIDTH, torch.float32, torch.device("cpu"))
        learner.set_thresholds(x)
        forward = learner.forward(x)
        (forward.recon - x).square().sum().add(learner.penalty(forward)).backward()
        return [t.grad for t in learner.tensors().values()]

    torch.set_num_threads(2)
    try:
        first, second, other = gradients_of(0), gradients_of(0), gradients_of(1)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
