"""Tests of the demo model: its answers, its transcoders, and the demonstration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import pycircuit as pc
from pycircuit.demo import demo_model, demonstration, facts, measurements
from pycircuit.demo.swap import active, swap, two_hop
from pycircuit.demo.tokenizer import NameTokenizer

KNOWN = facts.facts()
STATEMENTS = list(KNOWN.statements())
SAMPLE = STATEMENTS[::7]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return pc.load("demo")


@pytest.fixture(scope="module")
def graph(model):
    return pc.attribute(model, two_hop("Dallas"), progress=False)


def test_files_fit_a_wheel_and_are_as_committed(tmp_path: Path) -> None:
    folder = facts.DATA
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 8 << 20
    demo_model.verify_checksums()
    copied = tmp_path / "data"
    copied.mkdir()
    for p in files:
        (copied / p.relative_to(folder)).parent.mkdir(exist_ok=True)
        (copied / p.relative_to(folder)).write_bytes(p.read_bytes())
    (copied / "labels.json").write_text("{}")
    with pytest.raises(ValueError, match=r"as committed, got others: labels\.json"):
        demo_model.load_demo(folder=copied)


def test_model_knows_facts(model) -> None:
    accuracy = measurements.accuracy(model, STATEMENTS)
    held_out = accuracy.pop("two-hop, held out")
    assert accuracy.pop("two-hop") >= 0.95
    assert min(accuracy.values()) >= 0.98, accuracy
    assert held_out >= 0.9  # never shown: the model composes


@pytest.mark.parametrize("kind", demo_model.KINDS)
def test_transcoders_explain_model(kind: str) -> None:
    model = pc.load("demo", transcoders=kind)
    prompts = [model.tokens(s.prompt) for s in SAMPLE[::3]]
    evaluation = pc.evaluate(model, model.transcoders, prompts)
    assert min(evaluation.variance) >= 0.9 and max(evaluation.active) < 40, evaluation
    assert measurements.agreement(model, SAMPLE) >= 0.9


def test_dallas_to_austin_through_texas(graph) -> None:
    assert graph.certificate < 1e-5 and graph.targets.labels[0] == "Austin"
    path = measurements.labelled_path(graph)
    assert path[0] == "Dallas" and "Texas" in path[1:-1] and path[-1] == "Austin", path


def test_dallas_to_sacramento(model) -> None:
    prompt = two_hop("Dallas")
    changes = swap(model, prompt, "Texas", two_hop("Oakland"), "California")
    assert {c.value == 0 for c in changes} == {True, False}
    result = pc.intervene(model, prompt, changes, freeze="none")
    answers = [model.tokenizer.decode(int(p.argmax())) for p in (result.probabilities_before, result.probabilities)]
    assert answers == ["Austin", "Sacramento"]


def test_dallas_has_the_features_of_two_states(model) -> None:
    """Without those of Texas the model still says Austin; without those of Oklahoma too it does not."""
    prompt = two_hop("Dallas")
    texas, oklahoma = (active(model, prompt, state) for state in ("Texas", "Oklahoma"))
    answers = []
    for features in (texas, texas | oklahoma):
        off = [pc.Intervention(*feature, value=0.0) for feature in features]
        answers.append(
            model.tokenizer.decode(int(pc.intervene(model, prompt, off, freeze="none").probabilities.argmax()))
        )
    assert texas and oklahoma and answers[0] == "Austin" != answers[1], answers


def test_swapping_states(model) -> None:
    """Whatever follows the changed features runs unfrozen."""
    swaps = measurements.swaps(model, KNOWN, 50)
    wrong = [swap for swap in swaps if swap.answer != swap.expected]
    assert len(wrong) <= 5, wrong


def test_features_of_states(model) -> None:
    labels = set(model.labels.values())
    assert len(labels & set(KNOWN.capital)) >= 45
    on = active(model, two_hop("Houston"), "Texas")
    assert on and min(on.values()) > 0
    assert not active(model, two_hop("Chicago"), "Texas")


def test_steering_towards_a_state(model) -> None:
    """With five times one state's answer on at every token, the model answers that state for every city."""
    texas = active(model, facts.CITY[0].format("Dallas"), "say Texas")
    on = [pc.Intervention(layer, None, feature, value=5 * value) for (layer, _, feature), value in texas.items()]
    cities = [city for city, state in KNOWN.state.items() if state != "Texas"][::30]
    prompts = [form.format(city) for form in facts.CITY for city in cities]
    answers = [model.tokenizer.decode(ids) for ids in pc.generate(model, prompts, steer=on, max_new_tokens=1)]
    assert sum(word == "Texas" for word in answers) >= 0.9 * len(answers), answers


def test_labels_travel_with_the_graph(model, graph, tmp_path: Path) -> None:
    active = {(layer, feature) for layer, _, feature in graph.features.tolist()}
    assert graph.labels == {key: label for key, label in model.labels.items() if key in active}
    assert "Texas" in graph.labels.values() and len(graph.labels) < len(model.labels)
    graph.save(tmp_path / "g.safetensors")
    assert pc.Graph.load(tmp_path / "g.safetensors").labels == graph.labels
    graph.to_json(tmp_path / "g.json")
    page = json.loads((tmp_path / "g.json").read_text())
    assert any(node["clerp"] == "Texas" for node in page["nodes"])
    assert all(len(group) >= 3 for group in page["qParams"]["supernodes"])


def test_tokenizer() -> None:
    tokenizer = NameTokenizer(KNOWN.words())
    ids = tokenizer.encode("The capital of the state containing New York City is")
    words = [tokenizer.words[i] for i in ids]
    assert words == ["<bos>", *["the", "capital", "of", "the", "state", "containing"], "New York City", "is"]
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    with pytest.raises(ValueError, match=r"got 'Dalas'; it knows Dallas"):
        tokenizer.encode("the capital of the state containing Dalas is")
    assert len(set(tokenizer.words)) == len(tokenizer.words)


def test_facts_file_round_trip(tmp_path: Path) -> None:
    KNOWN.save(tmp_path / "facts.json")
    assert facts.Facts.load(tmp_path / "facts.json") == KNOWN
    assert len({s.prompt for s in STATEMENTS}) == len(STATEMENTS)  # no prompt has two answers


def test_wrong_kind() -> None:
    with pytest.raises(ValueError, match=r"must be a folder, a hub id, 'clt' or 'plt', got 'sae'"):
        pc.load("demo", transcoders="sae")


def test_demo_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pycircuit", "demo", "--plot", str(tmp_path / "dallas.svg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = (line for line in done.stdout.splitlines() if line.strip().startswith(("before", "after")))
    assert "before  Austin" in before and "after   Sacramento" in after
    assert "◀" in done.stdout and (tmp_path / "dallas.svg").read_text().startswith("<svg")


def test_demo_of_an_unknown_city() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pycircuit", "demo", "--city", "Atlantis"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "city must be a city the model knows, got 'Atlantis'" in done.stderr


@pytest.mark.parametrize(
    ("other", "message"),
    [("Oaklnd", "got 'Oaklnd'; it knows Oakland"), ("Houston", "other must be a city outside Texas, got 'Houston'")],
)
def test_demo_of_other_cities(other: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demonstration.run(Console(), "Dallas", other)


def test_half_precision(model) -> None:
    half = pc.load("demo", dtype=torch.bfloat16)
    assert half.hf_model.dtype == torch.bfloat16 and half.labels == model.labels
    graph = pc.attribute(half, facts.TWO_HOP.format("Dallas"), progress=False)
    assert graph.certificate < 1e-5 and graph.targets.labels[0] == "Austin"
