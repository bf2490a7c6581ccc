"""Validation: the predictions of edges against the changes of the model."""

from __future__ import annotations

import json
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
import transformers
from builders import KINDS, LAYERS, VOCABULARY, WIDTH, replacement

import pycircuit as pc
from pycircuit.interventions.graph_effects import edges_of, through_features

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = builders.prompt(9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_with_mlps_frozen_the_model_changes_by_its_edges(family: str, kind: str) -> None:
    """Features, errors and tokens, on every row, to float64."""
    model = replacement(family, kind, torch.float64)
    graph = pc.attribute(model, PROMPT, position=[-1, 4], max_targets=3, progress=False)
    report = pc.validate(model, graph, samples=30, factor=-0.5, kinds=["feature", "error", "token"])
    assert report.kinds["feature"] + report.kinds["error"] + report.kinds["token"] == 30 == len(report.nodes)
    assert min(report.kinds.values()) >= 9
    frozen = [a for a in report.agreements if a.freeze == "all"]
    assert {a.distance for a in frozen} == {None, *range(1, LAYERS + 2)}
    for a in frozen:
        assert a.pairs > 0
        assert a.correlation == pytest.approx(1, abs=1e-9)
        assert a.error < 1e-9 and a.explained == pytest.approx(1, abs=1e-12)
    assert report.overall("attention").error > 0.01  # random transcoders miss nearly all that the MLPs do


def test_effects_through_features_are_a_linear_solution() -> None:
    """(I - B)^-1 A, with B the edges per unit of activation, by a dense solver."""
    graph = pc.attribute(replacement("llama", "clt", torch.float64), PROMPT, max_targets=3, progress=False)
    nodes = list(range(0, graph.first_target, 7))
    dense, count = graph.dense().double().numpy(), len(graph.features)
    unit = np.zeros_like(dense)
    unit[:, :count] = dense[:, :count] / graph.values.double().numpy()
    expected = np.linalg.solve(np.eye(graph.nodes) - unit, dense)[graph.row_node.numpy()][:, nodes]
    direct = edges_of(graph, nodes)
    total = through_features(graph, direct)
    assert np.abs(total - expected).max() < 1e-10 * np.abs(expected).max()
    assert np.array_equal(direct, dense[graph.row_node.numpy()][:, nodes])
    assert np.abs(total - direct).max() > 0.1 * np.abs(direct).max()


def exact_model() -> pc.ReplacementModel:
    """A GPT-2 with ReLU: its MLPs are transcoders themselves, each hidden unit a feature."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64, activation_function="relu",
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float64)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) / parameter.shape[0] ** 0.5)
    mlps = [block.mlp for block in model.transformer.h]
    w_enc = [mlp.c_fc.weight.detach().T.contiguous() for mlp in mlps]
    w_dec = [mlp.c_proj.weight.detach().contiguous() for mlp in mlps]
    b_enc, b_dec = ([getattr(mlp, name).bias.detach() for mlp in mlps] for name in ("c_fc", "c_proj"))
    return pc.ReplacementModel(model, pc.PerLayerTranscoders(w_enc, b_enc, w_dec, b_dec), ignore_positions=0)


def test_everything_is_explained_where_transcoders_are_the_mlps() -> None:
    """A change too small to switch a feature on or off goes through the running MLPs as the graph says, to the end."""
    model = exact_model()
    graph = pc.attribute(model, PROMPT, max_targets=3, progress=False)
    small = pc.validate(model, graph, samples=24, factor=1 + 1e-9, kinds=["feature", "token"])
    running = small.overall("attention")
    assert small.kinds == {"feature": 15, "error": 0, "token": 9}  # every token
    assert running.explained > 1 - 1e-5 and running.correlation > 1 - 1e-5 and running.error < 1e-3
    free = small.overall("none")  # patterns and denominators move too, which the graph does not know
    assert 0.3 < free.explained < 1 - 1e-4
    ablated = pc.validate(model, graph, samples=24)
    assert ablated.kinds == {"feature": 24, "error": 0, "token": 0} and ablated.overall("all").explained > 1 - 1e-12
    assert 0.5 < ablated.overall("attention").explained < 1 - 1e-6  # ablation does switch some


def test_a_wrong_graph_is_not_faithful() -> None:
    """Edges that belong to other rows predict nothing, though the activations are right."""
    model = replacement("llama", "plt", torch.float64)
    graph = pc.attribute(model, PROMPT, max_targets=3, progress=False)
    graph.rows.weight[:] = graph.rows.weight.flip(0)
    assert pc.validate(model, graph, samples=16).overall("all").explained < 0.5


def test_the_report_is_kept_and_saved(tmp_path: Path) -> None:
    model = replacement("llama", "plt", torch.float32)
    graph = pc.attribute(model, PROMPT, max_targets=3, progress=False)
    assert graph.faithfulness is None
    pruned = graph.prune().graph
    report = pc.validate(model, graph, samples=9, seed=3)
    assert graph.faithfulness == report and pruned.faithfulness is None and graph.prune().graph.faithfulness is None
    graph.save(tmp_path / "g.safetensors")
    assert pc.Graph.load(tmp_path / "g.safetensors").faithfulness == report
    assert pc.validate(model, graph, samples=9, seed=3) == report
    assert pc.validate(model, graph, samples=9, seed=4).nodes != report.nodes
    text = str(report)
    assert text.startswith("9 features, each times 0\ndirect effects, everything frozen:\n")
    assert "total effects, MLPs running:" in text and "total effects, nothing frozen:" in text
    assert text.count("\n") == 6 + len(report.agreements)


def test_a_pruned_graph_and_one_with_few_rows() -> None:
    """Every row that a graph has is predicted; what a graph leaves out is not."""
    model = replacement("llama", "clt", torch.float64)
    graph = pc.attribute(model, PROMPT, max_targets=3, progress=False)
    for smaller in (graph.prune(0.6, 0.9).graph, pc.attribute(model, PROMPT, max_features=8, progress=False)):
        assert pc.validate(model, smaller, samples=16).overall("all").pairs > 0
    assert pc.validate(model, smaller, samples=16).overall("all").explained > 1 - 1e-12  # its rows are complete
    direction = ("up", 1.0, torch.ones(WIDTH, dtype=torch.float64))
    directed = pc.attribute(model, PROMPT, targets=[direction, 3], max_features=0, progress=False)
    report = pc.validate(model, directed, samples=8)
    assert report.overall("all").explained > 1 - 1e-12 and report.overall("all").pairs == 8  # the token's row alone


def test_effects_that_are_not_finite_are_counted_apart() -> None:
    """With denominators frozen, nothing bounds the MLPs' answer to a huge change: it may grow beyond float32."""
    model = replacement("llama", "plt", torch.float32)
    graph = pc.attribute(model, PROMPT, max_targets=3, progress=False)
    report = pc.validate(model, graph, samples=8, factor=1e30)
    running = report.overall("attention")
    assert running.lost > 0 and json.dumps(report.as_dict(), allow_nan=False)
    assert report.overall("all").lost == 0 and report.overall("all").explained > 1 - 1e-6
    assert running.pairs + running.lost == report.overall("all").pairs


def test_arguments() -> None:
    model = replacement("llama", "plt", torch.float32)
    graph = pc.attribute(model, PROMPT, max_targets=3, progress=False)
    other = pc.attribute(replacement("gpt2", "plt", torch.float32), PROMPT, max_targets=3, progress=False)
    with pytest.raises(TypeError, match=r"^validate: graph must be a pc.Graph, got ReplacementModel"):
        pc.validate(model, model)
    with pytest.raises(ValueError, match=r"^validate: graph must be of this model and its transcoders, got activ"):
        pc.validate(model, other)
    with pytest.raises(ValueError, match=r"^validate: samples must be at least 1, got 0"):
        pc.validate(model, graph, samples=0)
    with pytest.raises(ValueError, match=r"^validate: factor must be finite and change something, got 1.0"):
        pc.validate(model, graph, factor=1)
    for kinds in ("feature", ["features"], []):
        with pytest.raises(ValueError, match=r"^validate: kinds must be a list of feature, error, token, got"):
            pc.validate(model, graph, kinds=kinds)
    with pytest.raises(ValueError, match=r"^overall: freeze must be one of all, attention, none, got 'patterns'"):
        pc.validate(model, graph, samples=2).overall("patterns")


def layered_groups(graph: pc.Graph) -> list[list[int]]:
    """Groups of features of several layers, which hand changes on to each other."""
    by_layer = [(graph.features[:, 0] == layer).nonzero()[:, 0].tolist() for layer in range(graph.layers)]
    return [[nodes[i] for nodes in by_layer for i in range(start, min(start + 2, len(nodes)))] for start in (0, 2, 4)]


@pytest.mark.parametrize("kind", ["plt", "clt_skip"])
def test_groups_change_the_frozen_model_by_their_edges(kind: str) -> None:
    model = replacement("llama", kind, torch.float64)
    graph = pc.attribute(model, PROMPT, max_targets=3, progress=False)
    effects = pc.validate(model, graph, groups=layered_groups(graph), factors=[0, -0.5, 3], freeze="all")
    assert effects.predicted.shape == effects.measured.shape == (3, 3, len(effects.nodes))
    predicted, measured = effects.pairs()
    assert len(predicted) > 30 and np.abs(predicted).max() > 0.1
    assert np.abs(predicted - measured).max() < 1e-9 * np.abs(measured).max()
    assert effects.correlation == pytest.approx(1) and effects.slope == pytest.approx(1)
    assert effects.sign_agreement == 1
    first = effects.groups[0]
    inside = np.isin(effects.nodes, first.nodes)
    assert inside.any() and np.isnan(effects.predicted[0][:, inside]).all()  # a group's own features are set
    text = json.dumps(effects.as_dict(), allow_nan=False)
    assert json.loads(text)["groups"][0]["nodes"] == list(first.nodes)
    assert f"pairs={len(predicted)}" in repr(effects)


def test_groups_act_through_running_mlps_as_their_graph_says() -> None:
    """With MLPs as transcoders: a small change exactly, an ablation better with a floor at zero than without."""
    model = exact_model()
    graph = pc.attribute(model, PROMPT, max_targets=3, progress=False)
    groups = layered_groups(graph)
    small = pc.validate(model, graph, groups=groups, factors=[1 + 1e-9])
    predicted, measured = small.pairs()
    assert np.abs(predicted - measured).max() < 1e-5 * np.abs(measured).max()
    free = through_features(graph, 1e-9 * np.stack([edges_of(graph, group).sum(1) for group in groups], axis=1))
    rows = np.isin(graph.row_node.numpy(), small.nodes)
    unset = free[rows].T[:, None]  # as if a group's features moved each other
    known = np.isfinite(small.measured)
    assert np.abs(unset - small.measured)[known].max() > 1e-3 * np.abs(measured).max()
    ablated = pc.validate(model, graph, groups=groups, factors=[0.0])
    linear = small.predicted * (-1 / 1e-9)
    floor, without = (np.abs(p - ablated.measured)[known].sum() for p in (ablated.predicted, linear))
    assert floor < 0.98 * without
    assert ablated.correlation > 0.8


def test_arguments_of_groups() -> None:
    model = replacement("llama", "plt", torch.float32)
    graph = pc.attribute(model, PROMPT, max_targets=3, progress=False)
    with pytest.raises(ValueError, match=r"^validate: groups\[0\] must have features and nothing else, got \[\]"):
        pc.validate(model, graph, groups=[[]])
    with pytest.raises(ValueError, match=r"^validate: groups\[1\] must have features and nothing else, got"):
        pc.validate(model, graph, groups=[[0], [graph.first_error]])
    with pytest.raises(ValueError, match=r"^validate: groups must be a list of groups of nodes, got \[\]"):
        pc.validate(model, graph, groups=[])
    with pytest.raises(ValueError, match=r"^validate: factors must be finite numbers that change something, got \[1"):
        pc.validate(model, graph, groups=[[0]], factors=[1])
