"""Commands that trace, steer and convert, on a tiny model in folders."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from cli_world import PROMPT, World, active
from commands import Run
from format_files import write

import pycircuit as pc
from pycircuit.cli.changes import Steering
from pycircuit.ops.dispatch import multiplies_bfloat16
from pycircuit.trace.collect import RowCollector

pytestmark = pytest.mark.usefixtures("one_thread")


def test_attribute_prints_and_writes(run: Run, world: World, tmp_path: Path) -> None:
    files = {"save": tmp_path / "g.safetensors", "to_json": tmp_path / "page.json", "plot": tmp_path / "g.svg"}
    outputs = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", path)]
    done = run("attribute", *world.opening, PROMPT, *outputs, "--slug", "mine", "--node-threshold", 0.7, "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    graph = pc.attribute(pc.load(world.model, world.transcoders), PROMPT, progress=False)
    pruned = graph.prune(0.7)
    assert summary["files"] == {name: str(path) for name, path in files.items()}
    assert (summary["features"], summary["rows"], summary["edges"]) == (
        len(graph.features), graph.rows.count, graph.rows.entries,
    )  # fmt: skip
    assert summary["pruned"] == {"nodes": int(pruned.node_mask.sum()), "edges": int(pruned.edge_mask.sum())}
    assert (
        summary["prompt"] == PROMPT
        and summary["tokens"] == ["w1", *PROMPT.split()]
        and not summary["interrupted"]
        and summary["certificate"] < 1e-5
    )
    assert summary["scores"]["completeness"] == pytest.approx(graph.scores().completeness, rel=1e-5)
    first = summary["strongest"][0]
    node = graph.feature_node(first["layer"], first["position"], first["feature"])
    assert first["influence"] == pytest.approx(float(graph.influence()[: graph.first_error].max()), rel=1e-4)
    assert float(graph.influence()[node]) == pytest.approx(first["influence"], rel=1e-4)
    torch.testing.assert_close(pc.Graph.load(files["save"]).dense(), graph.dense())
    page = json.loads(files["to_json"].read_text())["metadata"]
    assert page["slug"] == "mine" and page["node_threshold"] == 0.7
    assert ElementTree.parse(files["plot"]).getroot().tag.endswith("svg")


def test_transcoders_whose_sites_are_options(run: Run, world: World, tmp_path: Path) -> None:
    write("crosslayer", tmp_path / "cross")
    command = ("estimate", world.model, "--transcoders", tmp_path / "cross", PROMPT)
    failed = run(*command, "--writes", "mlp_out")
    assert failed.code != 0 and "reads must be given for" in " ".join(failed.err.split())
    done = run(*command, "--reads", "blocks.0.hook_resid_mid", "--writes", "hook_mlp_out", "--cache", "1MiB")
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
    targets = json.loads(done.out)["targets"]
    assert [(t["token"], t["position"]) for t in targets] == [(9, 3), (7, 3), (9, 7), (7, 7), (-1, position)]
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
    summaries = [json.loads(line) for line in done.out.splitlines()]
    assert [s["tokens"] for s in summaries] == [["w1", *PROMPT.split()], ["w1", "w4", "w5", "w6"]]
    assert [s["line"] for s in summaries] == [1, 3]  # as an editor numbers them
    for summary in summaries:
        assert summary["files"] == {"save": str(tmp_path / f"{summary['line']:04d}.safetensors")}
        assert pc.Graph.load(summary["files"]["save"]).tokens.text == summary["tokens"]


def test_attribute_writes_the_rows_so_far_when_it_is_stopped(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expand, rounds = RowCollector.add_features, []

    def stop(self: RowCollector, picked: torch.Tensor) -> None:
        rounds.append(len(picked))
        if len(rounds) == 3:
            raise KeyboardInterrupt
        expand(self, picked)

    monkeypatch.setattr(RowCollector, "add_features", stop)
    command = ("attribute", *world.opening, PROMPT, "--max-features", 20, "--round-size", 4, "--json")
    done = run(*command, "--checkpoint", tmp_path / "rows", "--save", tmp_path / "part.safetensors")
    assert done.code == 130 and json.loads(done.out)["interrupted"]
    partial = pc.Graph.load(tmp_path / "part.safetensors")
    monkeypatch.setattr(RowCollector, "add_features", expand)
    done = run(*command, "--checkpoint", tmp_path / "rows")
    assert done.code == 0 and json.loads(done.out)["rows"] == partial.rows.count + 12
    assert run("attribute", *world.opening, PROMPT, "--checkpoint", tmp_path / "rows").code == 2


def test_attribute_follows_its_options(run: Run, world: World) -> None:
    before = torch.get_num_threads()
    options = ("--implementation", "reference", "--threads", 2, "--dtype", "float64")
    done = run("attribute", *world.opening, PROMPT, *options, "--json")
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


def test_estimate(run: Run, world: World) -> None:
    estimate = json.loads(run("estimate", *world.opening, PROMPT, "--max-features", 5, "--json").out)
    assert estimate["positions"] == 8 and estimate["rows"] == 5 + 10 and estimate["bytes"] > 0
    by_ids = json.loads(run("estimate", *world.opening, "--ids", "1,5,17,42, 8 23 11 3", "--json").out)
    assert by_ids["features"] == estimate["features"]
    assert "memory" in run("estimate", *world.opening, PROMPT).out
    assert run("estimate", *world.opening, PROMPT, "--precision", "half").code == 2
    bfloat16 = json.loads(
        run("estimate", *world.opening, PROMPT, "--max-features", 5, "--precision", "bfloat16", "--json").out
    )
    copied = not multiplies_bfloat16()  # else the native ops split numbers, and no copies are made of them
    assert (bfloat16["bytes"] > estimate["bytes"]) == copied and bfloat16["bytes"] >= estimate["bytes"]


def test_intervene(run: Run, world: World) -> None:
    layer, position, feature = active(world)
    done = run("intervene", *world.opening, PROMPT, "--set", f"{layer}/{position}/{feature}=40", "--ablate",
               f"{layer}/5:/{feature}", "--scale", f"1/*/{feature}=-2", "--effect", f"2/-1/{feature}", "--top", 61,
               "--freeze", "none", "--json")  # fmt: skip
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    changes = [
        pc.Intervention(layer, position, feature, value=40.0),
        pc.Intervention(1, None, feature, factor=-2.0),
        pc.Intervention(layer, slice(5, None), feature, value=0.0),
    ]
    result = pc.intervene(pc.load(world.model, world.transcoders), PROMPT, changes, freeze="none")
    for token in printed["tokens"]:
        assert token["text"] == f"w{token['id']}"
        assert token["before"] == pytest.approx(float(result.probabilities_before[token["id"]]), rel=1e-5)
        assert token["after"] == pytest.approx(float(result.probabilities[token["id"]]), rel=1e-5)
    after = [token["after"] for token in printed["tokens"]]
    assert len(after) == 61 and after == sorted(after, reverse=True)
    assert max(abs(token["after"] - token["before"]) for token in printed["tokens"]) > 1e-3
    (effect,) = printed["effects"]
    assert effect == {"layer": 2, "position": -1, "feature": feature, "change": effect["change"]}
    assert effect["change"] == pytest.approx(float(result.effect([(2, -1, feature)])[0]), rel=1e-4)


def test_intervene_prints_a_table(run: Run, world: World) -> None:
    layer, position, feature = active(world)
    name = f"{layer}/{position}/{feature}"
    done = run("intervene", *world.opening, PROMPT, "--ablate", name, "--layers", "0-1", "--top", 3, "--effect", name)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["next", "token", "before", "after"] and len(lines) == 5
    assert lines[-1].startswith(f"{name}: ")
    refused = run("intervene", *world.opening, PROMPT, "--ablate", "7/1/1")
    assert refused.code == 2 and "layer" in refused.err


def test_features_by_their_label(run: Run, world: World) -> None:
    model = pc.load(world.model, world.transcoders)
    model.labels = {(1, 7): "Texas", (0, 3): "Texas", (2, 5): "a = b"}
    changes = Steering(["a = b=4"], ["Texas=2.5"], ["Texas", "0/*/1"]).changes()
    assert [made for change in changes for made in change.interventions(model)] == [
        pc.Intervention(2, None, 5, value=4.0),
        pc.Intervention(0, None, 3, factor=2.5),
        pc.Intervention(1, None, 7, factor=2.5),
        pc.Intervention(0, None, 3, value=0.0),
        pc.Intervention(1, None, 7, value=0.0),
        pc.Intervention(0, None, 1, value=0.0),
    ]
    with pytest.raises(ValueError, match="or a label of the model's, got 'Texa'; there is Texas"):
        Steering(ablation=["Texa"]).changes()[0].interventions(model)
    done = run("intervene", *world.opening, PROMPT, "--ablate", "Texas")
    assert done.code == 2 and "or a label of the model's, got 'Texas'\n" in done.err


def test_generate(run: Run, world: World, tmp_path: Path) -> None:
    layer, _, feature = active(world)
    steered = ("--set", f"{layer}/*/{feature}=60", "--max-new-tokens", 6)
    model = pc.load(world.model, world.transcoders)
    plain = pc.generate(model, PROMPT, max_new_tokens=6)
    expected = pc.generate(model, PROMPT, steer=[pc.Intervention(layer, None, feature, value=60.0)], max_new_tokens=6)
    assert plain != expected
    printed = json.loads(run("generate", *world.opening, PROMPT, *steered, "--json").out)
    assert printed["tokens"] == expected and printed["prompt"] == PROMPT
    assert printed["text"] == model.tokenizer.decode(expected)
    assert run("generate", *world.opening, PROMPT, *steered).out == printed["text"] + "\n"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'"{PROMPT}"\n[1, 4, 5]\n')
    drawn = ("--temperature", 1.5, "--top-k", 20, "--top-p", 0.9, "--seed", 5, "--max-new-tokens", 6)
    both = json.loads(run("generate", *world.opening, "--prompts", prompts, *drawn, "--json").out)
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 5, "max_new_tokens": 6}
    assert [result["tokens"] for result in both] == pc.generate(model, [PROMPT, [1, 4, 5]], **options)
    assert len(run("generate", *world.opening, "--prompts", prompts).out.splitlines()) == 2
    assert "top_p must be above 0" in run("generate", *world.opening, PROMPT, "--top-p", 2).err


def test_inspect_and_convert(run: Run, world: World, tmp_path: Path) -> None:
    report = json.loads(run("inspect", world.transcoders, "--json").out)
    assert report == pc.transcoders.inspect(world.transcoders).json() and report["features"] == [48, 48, 48]
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
