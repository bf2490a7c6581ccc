"""Truth of graphs: its arithmetic against the model, its statistics, and a run that is stopped and goes on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pycircuit as pc
from pycircuit.demo.facts import DATA
from pycircuit.graph import Supernode
from pycircuit.transcoders import io
from pycircuit.truth import Behaviour, TruthRun, behaviours, figure, section, statistics
from pycircuit.truth.baselines import answer_gradient, feature_gradients, neuron_graph, random_transcoders
from pycircuit.truth.effect_meter import EffectMeter

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
PROMPT = "the code of the state containing Emporia is"


@pytest.fixture(scope="module")
def model() -> pc.ReplacementModel:
    return pc.load("demo")


@pytest.fixture(scope="module")
def graph(model: pc.ReplacementModel) -> pc.Graph:
    return pc.attribute(model, PROMPT, max_targets=1, max_features=64, labels=False, progress=False)


def strongest(graph: pc.Graph, values: np.ndarray, count: int) -> list[Supernode]:
    nodes = np.argsort(-np.abs(values[: graph.first_error]))[:count]
    return [Supernode(str(node), (int(node),)) for node in nodes]


def test_measured_effects_are_those_of_validate(model: pc.ReplacementModel, graph: pc.Graph) -> None:
    groups = graph.supernodes(method="structure")
    result = pc.validate(model, graph, groups=groups, factors=(0.0, 2.0), freeze="none")
    rows = np.isin(graph.row_node.numpy(), result.nodes)
    measured = EffectMeter(model, graph).changes(groups, (0.0, 2.0), "none")[:, :, rows].transpose(1, 0, 2)
    known = np.isfinite(result.measured)
    assert known.any() and np.allclose(measured[known], result.measured[known], atol=1e-5)


def test_the_replacement_model_is_the_model_until_a_feature_changes(
    model: pc.ReplacementModel, graph: pc.Graph
) -> None:
    groups = strongest(graph, graph.influence().numpy(), 3)
    meter = EffectMeter(model, graph)
    unchanged, ablated = meter.changes(groups, (1.0, 0.0), "none", replaced=True)
    assert np.abs(unchanged).max() < 1e-3 < np.abs(ablated).max()


@pytest.mark.parametrize("replaced", [False, True])
def test_an_overflow_is_left_out_and_disturbs_no_other_change(
    model: pc.ReplacementModel, graph: pc.Graph, replaced: bool
) -> None:
    lowest, highest = (int(graph.features[:, 0].eq(layer).nonzero()[0]) for layer in (0, model.depth - 1))
    influence = graph.prune().influence[: graph.first_error].numpy()
    groups, factors = [Supernode("both", (lowest, highest)), *strongest(graph, influence, 1)], (0.0, 1e38)
    changes = EffectMeter(model, graph).changes(groups, factors, "attention", replaced)
    assert not np.isfinite(changes[1]).all(1).any() and np.isfinite(changes[0]).all()
    alone = EffectMeter(model, graph).changes(groups, factors[:1], "attention", replaced)
    np.testing.assert_allclose(changes[0], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neurons", [False, True])
def test_small_effects_are_gradients(model: pc.ReplacementModel, graph: pc.Graph, neurons: bool) -> None:
    """Effects of features and of neurons, nothing frozen."""
    token = int(graph.targets.ids[0])
    if neurons:
        model, graph = neuron_graph(model, PROMPT, token, 16)
        assert graph.certificate < 1e-5
    slopes = feature_gradients(model, graph, answer_gradient(model, PROMPT, token)).numpy()
    groups = strongest(graph, slopes, 4)
    answer = int((graph.row_node >= graph.first_target).nonzero()[0, 0])
    low, high = EffectMeter(model, graph).changes(groups, (0.999, 1.001), "none")[:, :, answer]
    assert np.allclose((high - low) / 0.002, [slopes[group.nodes[0]] for group in groups], rtol=0.02)


def test_random_transcoders_are_as_sparse_and_as_long(model: pc.ReplacementModel) -> None:
    """Random rows of transcoders whose decoders stay in their files."""
    lazy = io.load(DATA / "clt", None, torch.float32, lazy=True)
    drawn = random_transcoders(lazy, [2.0, 8.0, 10.0])
    assert [rule.k for rule in drawn.activation] == [2, 8, 10]  # type: ignore[union-attr]
    for own, other in zip(model.transcoders.w_dec, drawn.w_dec, strict=True):
        assert torch.allclose(own.norm(dim=-1), other.norm(dim=-1), atol=1e-5) and not torch.allclose(own, other)


def test_a_line_has_its_figures_and_noise_an_interval() -> None:
    draws = np.random.default_rng(0)
    prompts = [(x, 2 * x) for x in draws.normal(size=(20, 5))]
    line = statistics.agreement(prompts)
    assert line["pairs"] == 100
    for name, value in (("correlation", 1), ("slope", 2), ("signs", 1), ("missed", 0.5)):
        assert np.allclose(line[name], value)
    noisy = statistics.agreement([(x, x + draws.normal(size=5)) for x, _ in prompts])["correlation"]
    assert noisy[1] < 0.707 < noisy[2] and noisy[1] < noisy[0] < noisy[2]
    assert statistics.rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)


def test_the_page_has_the_committed_figures() -> None:
    """docs/truth.md and its picture are what benchmarks/truth.py makes of the results."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        truth = importlib.import_module("truth")
    finally:
        sys.path.pop(0)
    measured = truth.documents()
    assert (ROOT / "docs/truth.md").read_text() == truth.page(measured)
    assert (ROOT / "docs/truth.svg").read_text() == figure(measured)


def test_a_stopped_run_goes_on(model: pc.ReplacementModel, tmp_path: Path) -> None:
    chosen = [Behaviour(b.name, b.candidates[:3]) for b in behaviours("demo")[2:4]]
    run = TruthRun("demo", {"clt": model}, chosen, tmp_path / "truth.json", 1, 64, 32, 1)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "prompts" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(stop)
    settings, record = run.partial.read_text().splitlines()
    marked = {**json.loads(record), "processor_seconds": 6000}
    run.partial.write_text(f"{settings}\n{json.dumps(marked)}\n" + record[:50])  # cut off by a kill
    other = TruthRun("demo", {"clt": model}, chosen, tmp_path / "truth.json", 1, 32, 32, 1)
    with pytest.raises(ValueError, match="rows 64 against 32"):
        other.run(False)
    document = run.run(False)
    assert document["processor_minutes"] >= 100 and not run.partial.exists()
    assert json.loads(run.out.read_text()) == document
    assert list(document["sets"]) == ["clt", "random", "neurons"] and len(document["questions"]) == 2
    assert document["sets"]["clt"]["replacement"][0] > document["sets"]["random"]["replacement"][0]
    text = section(document)
    assert "supernode ablated | patterns and norms |" in text and "clt, graph: correlation" in text
    assert figure([document]).startswith("<svg")
