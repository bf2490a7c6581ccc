"""Tests of `pycircuit graph`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Run
from graphs import random_graph

import pycircuit as pc
from pycircuit.graph.identifiers import identifier


@pytest.fixture
def file(tmp_path: Path) -> Path:
    random_graph(count=40).save(tmp_path / "g.safetensors")
    return tmp_path / "g.safetensors"


def test_what_a_file_holds(run: Run, file: Path) -> None:
    graph = random_graph(count=40)
    done = run("graph", file, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert (facts["features"], facts["rows"], facts["edges"], facts["layers"]) == (
        len(graph.features), graph.rows.count, graph.rows.entries, graph.layers,
    )  # fmt: skip
    assert facts["certificate"] == graph.certificate and facts["scores"] == pytest.approx(graph.scores()._asdict())
    best = int(graph.influence()[: graph.first_error].argmax())
    assert facts["strongest"][0]["id"] == identifier(graph, best) and facts["targets"][0]["label"] == " t0"
    assert facts["pruned"]["nodes"] == int(graph.prune().node_mask.sum())
    pruned = json.loads(run("graph", file, "--prune", "--node-threshold", "0.5", "--json").out)
    expected = graph.prune(0.5).graph
    assert (pruned["features"], pruned["edges"]) == (len(expected.features), expected.rows.entries)
    text = run("graph", file, "--tree").out
    assert f"{graph.rows.entries} edges" in text and "t0" in text and "law " in text


def test_paths(run: Run, file: Path) -> None:
    graph = random_graph(count=40)
    facts = json.loads(run("graph", file, "--paths", "token/0", "target/1", "--k", "3", "--json").out)
    expected = graph.paths(graph.token_node(0), graph.target_node(1), 3)
    got = [([n["id"] for n in path["nodes"]], path["strength"]) for path in facts["paths"]]
    assert got == [([identifier(graph, n) for n in path.nodes], pytest.approx(path.strength)) for path in expected]
    assert len(got) == 3 and "token/0 ->" in run("graph", file, "--paths", "token/0", "target/1").out
    done = run("graph", file, "--paths", "token/9", "target/1")
    assert done.code == 2 and "--paths: a node must be in the graph, got token/9" in done.err


def test_every_format_into_every_other(run: Run, file: Path, tmp_path: Path) -> None:
    """The pruned graph in each format that reads has the same edges, features and targets."""
    expected = random_graph(count=40).prune().graph
    assert run("graph", file, "--prune", "--out", tmp_path / "0.safetensors").code == 0
    endings = ("safetensors", "json", "pt")
    for i, source in enumerate(endings):
        outputs = [tmp_path / f"{source}-{target}.{target}" for target in endings]
        options = ("--node-threshold", "1", "--edge-threshold", "1") if source != "json" else ()
        first = tmp_path / ("0.safetensors" if i == 0 else f"safetensors-{source}.{source}")
        done = run("graph", first, *options, *(word for path in outputs for word in ("--out", path)), "--json")
        assert done.code == 0 and json.loads(done.out)["files"] == [str(path) for path in outputs]
        for path in outputs:
            graph = pc.Graph.open(path)
            order = [graph.features.tolist().index(f) for f in expected.features.tolist()]
            order += range(len(order), graph.nodes)
            torch.testing.assert_close(graph.dense()[order][:, order].double(), expected.dense())
            assert graph.targets.labels == [" t0", " t1"] and graph.tokens.ids.tolist() == [7, 8, 9]


def test_other_formats(run: Run, file: Path, tmp_path: Path) -> None:
    names = ["g.graphml", "g.svg", "tables", "n.json"]
    options = [word for name in names for word in ("--out", tmp_path / name)]
    done = run("graph", file, *options, "--flavour", "neuronpedia", "--scan", "gemma-2-2b", "--source-set", "clt-hp",
               "--slug", "mine")  # fmt: skip
    assert done.code == 0 and all((tmp_path / name).exists() for name in names)
    assert (tmp_path / "tables" / "edges.parquet").stat().st_size > 0
    metadata = json.loads((tmp_path / "n.json").read_text())["metadata"]
    assert (metadata["slug"], metadata["scan"]) == ("mine", "gemma-2-2b")
    assert metadata["feature_details"] == {"neuronpedia_source_set": "clt-hp"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.safetensors",), "path must be a file, got absent.safetensors"),
        (("absent.json",), "Graph.from_json: path must be a file, got absent.json"),
        (("g.txt",), "Graph.open: path must end in .safetensors, .json, .pt, got g.txt"),
        (("g.safetensors", "--out", "x.csv"), "--out must end in .safetensors, .json, .pt, .graphml, .svg, or be a"),
        (("g.safetensors", "--out", "absent/x.json"), "--out must be in a folder that exists, got absent/x.json"),
        (("g.safetensors", "--node-threshold", "2"), "graph: node_threshold must be from 0 to 1, got 2"),
        (("g.safetensors", "--out", "x.json", "--flavour", "html"), "flavour must be one of circuit-tracer, neuron"),
        (("g.safetensors", "--paths", "a", "b"), "--paths: a node must be LAYER/POSITION/FEATURE"),
    ],
)
def test_wrong_arguments(
    run: Run, file: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    done = run("graph", *arguments)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1 and not Path("x.csv").exists()


def test_attribute_writes_either_flavour(run: Run, tmp_path: Path) -> None:
    command = ("attribute", "demo", "the capital of the state of Texas is", "--quiet", "--json", "--max-features", "8")
    options = ("--to-json", tmp_path / "n.json", "--flavour", "neuronpedia", "--scan", "gemma-2-2b")
    assert run(*command, *options).code == 0
    assert json.loads((tmp_path / "n.json").read_text())["metadata"]["scan"] == "gemma-2-2b"
    done = run(*command, "--flavour", "html")
    assert done.code == 2 and "--flavour must be one of circuit-tracer, neuronpedia, got 'html'" in done.err
