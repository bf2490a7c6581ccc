"""Tests of contrasts, the targets that ask why one token rather than another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from builders import replacement
from commands import Run
from trace_helpers import by_autograd

import pycircuit as pc
from pycircuit.cli.options import parse_targets
from pycircuit.trace.contrast import contrast_label, direction

DALLAS = "the capital of the state containing Dallas is"
KINDS = [("llama", "plt_skip"), ("gemma2", "clt"), ("gpt2", "plt")]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def demo() -> pc.ReplacementModel:
    return pc.load("demo")


@pytest.fixture(scope="module")
def graph(demo: pc.ReplacementModel) -> pc.Graph:
    return pc.attribute(demo, DALLAS, targets=[pc.Contrast("Austin", "Sacramento")], progress=False)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_row_is_the_difference_of_the_rows_of_its_tokens(family: str, kind: str) -> None:
    """In float64, also with sets of tokens on both sides and at two positions; and the law holds."""
    model = replacement(family, kind, torch.float64)
    targets = [pc.Contrast([3, 5], [7, 9, 11]), pc.Contrast(3, 7), 3, 5, 7, 9, 11]
    result = pc.attribute(model, builders.prompt(7), targets=targets, position=[-1, 4], progress=False)
    rows = result.dense()[result.first_target :].reshape(2, len(targets), -1)
    scale = rows.abs().amax()
    assert float((rows[:, 0] - (rows[:, 2:4].mean(1) - rows[:, 4:].mean(1))).abs().max() / scale) < 1e-12
    assert float((rows[:, 1] - (rows[:, 2] - rows[:, 4])).abs().max() / scale) < 1e-12
    assert result.certificate < 1e-10 and result.targets.ids.tolist() == [-1, -1, 3, 5, 7, 9, 11] * 2


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_row_equals_autograd(family: str, kind: str) -> None:
    model = replacement(family, kind, torch.float64)
    prompt = builders.prompt(7)
    result = pc.attribute(model, prompt, targets=[pc.Contrast([3, 5], 7)], max_features=0, progress=False)
    local = model.freeze(prompt)
    head = model.hf_model.get_output_embeddings().weight.double()
    truth = by_autograd(local, [result.layers], [6], ((head[3] + head[5]) / 2 - head[7])[None])[0]
    got = result.dense()[result.first_target, : result.first_target]
    assert float((got - truth).norm() / truth.norm()) < 1e-10


def test_preactivation_is_the_models_own_logit_difference(demo: pc.ReplacementModel, graph: pc.Graph) -> None:
    ids = graph.tokens.ids
    logits = demo.hf_model(ids[None]).logits[0, -1].detach().double()
    single = pc.attribute(demo, DALLAS, targets=["Austin", "Sacramento"], max_features=0, progress=False)
    austin, sacramento = single.targets.ids.tolist()
    assert float(graph.preactivation[graph.row_node == graph.target_node()]) == pytest.approx(
        float(logits[austin] - logits[sacramento]), rel=1e-5
    )
    assert graph.targets.labels == ["Austin − Sacramento"] and graph.certificate < 1e-5
    assert graph.provenance["contrasts"] == {"Austin − Sacramento": [[austin], [sacramento]]}


def test_an_ablation_moves_the_logit_difference_by_the_edge(demo: pc.ReplacementModel, graph: pc.Graph) -> None:
    """With everything frozen, removing a feature changes the model's own difference by minus its edge."""
    edges = graph.dense()[graph.target_node(), : graph.first_error]
    austin, sacramento = graph.provenance["contrasts"]["Austin − Sacramento"]
    unchanged = pc.intervene(demo, DALLAS, [pc.Intervention(0, 1, 0, factor=1.0)], freeze="all")
    before = float(unchanged.logits[-1, austin[0]] - unchanged.logits[-1, sacramento[0]])
    for node in edges.abs().topk(4).indices.tolist():
        layer, position, feature = graph.features[node].tolist()
        after = pc.intervene(demo, DALLAS, [pc.Intervention(layer, position, feature, 0.0)], freeze="all")
        change = float(after.logits[-1, austin[0]] - after.logits[-1, sacramento[0]]) - before
        assert change == pytest.approx(-float(edges[node]), rel=1e-3, abs=1e-4)


def test_validate_measures_contrasts(demo: pc.ReplacementModel) -> None:
    """A contrast counts as its tokens do; rows of directions, whose vectors a graph does not hold, are left out."""
    head = demo.hf_model.get_output_embeddings().weight
    plain = pc.attribute(demo, DALLAS, targets=[("d", 1.0, head[116].detach())], max_features=0, progress=False)
    contrast = pc.attribute(
        demo, DALLAS, targets=[pc.Contrast(["Austin"], ["Sacramento", "Boston"])], max_features=0, progress=False
    )
    assert pc.validate(demo, plain, samples=4).agreements == []
    report = pc.validate(demo, contrast, samples=4, factor=0.5)
    direct = next(a for a in report.agreements if a.freeze == "all" and a.distance is None)
    assert direct.pairs == 4 and direct.error is not None and direct.error < 1e-3


@pytest.mark.parametrize("sides", [3, [], [[1]], [[1], []], [[1], [10**6]], [[1], ["a"]], [[True], [2]], [[1], 2]])
def test_files_with_contrasts_of_another_kind(demo: pc.ReplacementModel, graph: pc.Graph, sides: Any) -> None:
    damaged = replace(graph, provenance={**graph.provenance, "contrasts": {"Austin − Sacramento": sides}})
    with pytest.raises(ValueError, match="validate: a contrast must have two lists of token ids of this model, got"):
        pc.validate(demo, damaged, samples=1)


def test_saved_and_exported(graph: pc.Graph, tmp_path: Path) -> None:
    graph.save(tmp_path / "g.safetensors")
    loaded = pc.Graph.load(tmp_path / "g.safetensors")
    assert loaded.targets.labels == graph.targets.labels and loaded.provenance["contrasts"]
    assert loaded.prune().graph.provenance["contrasts"] == graph.provenance["contrasts"]
    graph.to_json(tmp_path / "g.json")
    assert 'Output \\"Austin \\u2212 Sacramento\\" (p=' in (tmp_path / "g.json").read_text()


def test_estimate_and_checkpoint_take_contrasts(demo: pc.ReplacementModel, tmp_path: Path, graph: pc.Graph) -> None:
    targets = [pc.Contrast("Austin", "Sacramento")]
    assert pc.estimate(demo, DALLAS, targets=targets, progress=False).bytes > 0
    for _ in range(2):  # the second goes on from the rows of the first
        again = pc.attribute(demo, DALLAS, targets=targets, checkpoint=tmp_path / "rows", progress=False)
        assert torch.allclose(again.dense(), graph.dense())


def test_labels() -> None:
    assert contrast_label(([" Austin"], [" Sacramento", " Boston"])) == "Austin − Sacramento, Boston"
    assert contrast_label(([" a"], ["a"])) == " a − a"
    assert contrast_label(([" "], ["a"])) == "  − a"


def test_direction_has_no_common_logit() -> None:
    """A constant added to every logit, which changes no probability, changes no contrast."""
    unembedding = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sides = ((1, 2, 3), (4,))
    assert torch.allclose(direction(unembedding, sides), direction(unembedding + 5, sides), atol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "against", "error", "message"),
    [
        ([], "Austin", ValueError, "Contrast: tokens must have at least one token, got none"),
        ("Austin", [], ValueError, "Contrast: against must have at least one token, got none"),
        (1.5, 2, TypeError, r"Contrast: tokens must be token ids or token strings, got 1\.5"),
        ("Austin", True, TypeError, "Contrast: against must be token ids or token strings, got True"),
        ("Austin", "Austin", ValueError, "Contrast: tokens must be distinct and on one side only, got token 116 twice"),
        (["Austin", 116], "Dallas", ValueError, "tokens must be distinct and on one side only, got token 116 twice"),
        ("Austin", "the capital", ValueError, "targets must be single tokens, got 'the capital'"),
        ("Austin", 10**6, ValueError, r"targets must be token ids from 0 to \d+, got 1000000"),
    ],
)
def test_wrong_sides(
    demo: pc.ReplacementModel, tokens: Any, against: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pc.attribute(demo, DALLAS, targets=[pc.Contrast(tokens, against)], progress=False)


def test_a_direction_may_not_pass_for_a_contrast(demo: pc.ReplacementModel) -> None:
    vector = torch.ones(demo.hf_model.config.hidden_size)
    targets = [pc.Contrast("Austin", "Sacramento"), ("Austin − Sacramento", 1.0, vector)]
    with pytest.raises(ValueError, match="targets must have labels of their own, got 'Austin − Sacramento' of two"):
        pc.attribute(demo, DALLAS, targets=targets, progress=False)


def test_numpy_ids() -> None:
    assert pc.Contrast(np.int64(3), [np.int32(4)]).sides(int) == ((3,), (4,))


def test_command_line(run: Run) -> None:
    done = run("attribute", "demo", DALLAS, "--target", "Austin", "--against", "Sacramento", "--json", "--quiet")
    assert done.code == 0 and '"label": "Austin \\u2212 Sacramento"' in done.out
    done = run("attribute", "demo", DALLAS, "--against", "Sacramento")
    assert done.code == 2 and "--against must go with the tokens of --target, got none" in done.err


def test_parsed_targets() -> None:
    assert parse_targets([], []) is None
    assert parse_targets(["Austin-vs-Sacramento"], []) == ["Austin-vs-Sacramento"]  # a token's text, as any other
    assert parse_targets(["id:5", "Austin"], ["Boston"]) == [pc.Contrast([5, "Austin"], "Boston")]
    with pytest.raises(ValueError, match="must be tokens, got the feature 0/7/20"):
        parse_targets(["Austin"], ["0/7/20"])
