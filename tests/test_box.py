"""The model in the box: what it knows, what its transcoders explain, and the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pycircuit as pc
from pycircuit.demo import box, facts, measure
from pycircuit.demo.tokenizer import Names

KNOWN = facts.facts()
STATEMENTS = list(KNOWN.statements())
SOME = STATEMENTS[::7]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return pc.load("demo")


@pytest.fixture(scope="module")
def graph(model):
    return pc.attribute(model, facts.TWO_HOP.format("Dallas"), progress=False)


def test_box_fits_a_wheel_and_is_what_was_committed(tmp_path: Path) -> None:
    files = [p for p in box.BOX.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 8 << 20
    box.verify()
    copied = tmp_path / "box"
    copied.mkdir()
    for p in files:
        (copied / p.relative_to(box.BOX)).parent.mkdir(exist_ok=True)
        (copied / p.relative_to(box.BOX)).write_bytes(p.read_bytes())
    (copied / "labels.json").write_text("{}")
    with pytest.raises(ValueError, match=r"as committed, got others: labels\.json"):
        box.load_box(box=copied)


def test_facts_are_known(model) -> None:
    found = measure.accuracy(model, STATEMENTS)
    held_out = found.pop("two-hop, held out")
    assert found.pop("two-hop") >= 0.95
    assert min(found.values()) >= 0.98, found
    assert held_out >= 0.9  # never shown: the model composes


@pytest.mark.parametrize("kind", box.KINDS)
def test_transcoders_explain_the_model(kind: str) -> None:
    model = pc.load("demo", transcoders=kind)
    sample = SOME[::3]
    found = pc.evaluate(model, model.transcoders, [model.tokens(s.prompt) for s in sample])
    assert min(found.variance) >= 0.9 and max(found.active) < 40, found
    assert measure.agreement(model, SOME) >= 0.9


def test_dallas_to_austin(graph) -> None:
    assert graph.certificate < 1e-5 and graph.targets.labels[0] == "Austin"
    assert graph.scores().replacement > 0.9


def test_labels_travel_with_the_graph(model, graph, tmp_path: Path) -> None:
    named = set(graph.labels.values())
    assert len(named) > 10
    graph.save(tmp_path / "g.safetensors")
    assert pc.Graph.load(tmp_path / "g.safetensors").labels == graph.labels
    graph.to_json(tmp_path / "g.json")
    page = json.loads((tmp_path / "g.json").read_text())
    assert named & {node["clerp"] for node in page["nodes"]}
    assert all(len(group) >= 3 for group in page["qParams"]["supernodes"])


def test_names() -> None:
    names = Names(KNOWN.words())
    ids = names.encode("The capital of the state containing New York City is")
    assert [names.words[i] for i in ids] == [
        "<bos>",
        "the",
        "capital",
        "of",
        "the",
        "state",
        "containing",
        "New York City",
        "is",
    ]
    assert names.encode(names.decode(ids)) == ids
    with pytest.raises(ValueError, match=r"got 'Dalas'; it knows Dallas"):
        names.encode("the capital of the state containing Dalas is")
    assert len(set(names.words)) == len(names.words)


def test_facts_file_round_trip(tmp_path: Path) -> None:
    KNOWN.save(tmp_path / "facts.json")
    assert facts.Facts.load(tmp_path / "facts.json") == KNOWN
    assert len({s.prompt for s in STATEMENTS}) == len(STATEMENTS)  # no prompt has two answers


def test_wrong_kind() -> None:
    with pytest.raises(ValueError, match=r"must be one of clt, plt, got 'sae'"):
        pc.load("demo", transcoders="sae")


def test_demo_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pycircuit", "demo", "--plot", str(tmp_path / "dallas.svg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Austin" in done.stdout and "before" in done.stdout and "after" in done.stdout
    assert "◀" in done.stdout and (tmp_path / "dallas.svg").read_text().startswith("<svg")


def test_demo_of_a_city_it_does_not_know() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pycircuit", "demo", "--city", "Atlantis"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "city must be a city the box knows, got 'Atlantis'" in done.stderr


def test_half_precision_box(model) -> None:
    half = pc.load("demo", dtype=torch.bfloat16)
    assert half.hf_model.dtype == torch.bfloat16 and half.labels == model.labels
    found = pc.attribute(half, facts.TWO_HOP.format("Dallas"), progress=False)
    assert found.certificate < 1e-5 and found.targets.labels[0] == "Austin"
