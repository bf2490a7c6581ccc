"""Edges against the conservation law and against autograd on the frozen model, for every family and kind."""

from __future__ import annotations

from typing import Any

import builders
import pytest
import torch
from builders import EVERY, KINDS, replacement, transcoders
from torch import Tensor
from trace_helpers import assert_agrees_with_reference, by_autograd

import pycircuit as pc
from pycircuit.trace.precision import FLOAT32, FLOAT64
from pycircuit.trace.sweep import Sweep

WEIGHTS = ("w_enc", "b_enc", "w_dec", "b_dec", "w_skip")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_law(family: str, kind: str) -> None:
    """Edges plus bias are the pre-activation: float32 to 1e-5, float64 to 1e-10, of the terms they add up."""
    for implementation, arithmetic in (("native", FLOAT32), ("reference", FLOAT32), ("reference", FLOAT64)):
        model = replacement(family, kind, arithmetic.dtype)
        with pc.use(implementation):
            graph = pc.attribute(model, builders.prompt(), position=[-1, 4], max_targets=3)
            assert pc.last_run().implementation == implementation
        assert graph.rows.count == len(graph.features) + len(graph.targets) > 20
        assert graph.certificate < arithmetic.tolerance == graph.provenance["tolerance"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "olmo2", "gpt2"])
def test_every_edge_equals_autograd(family: str, kind: str) -> None:
    local = replacement(family, kind, torch.float64).freeze(builders.prompt(9))
    layer, position, vectors = [], [], []
    for source_layer, features in enumerate(local.features):
        layer += [source_layer] * features.count
        position += features.position().tolist()
        vectors += [local.transcoders.w_enc[source_layer][i] for i in features.index.tolist()]
    depth = len(local.features)
    layer, position = [*layer, depth, depth], [*position, 8, 3]
    vectors += list(local.model.unembedding[:2] - local.model.unembedding_mean)
    got, _ = Sweep(local).rows(layer, position, torch.stack(vectors))
    truth = by_autograd(local, layer, position, torch.stack(vectors))
    assert got.shape == truth.shape
    assert float(((got - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-30)).max()) < 1e-10


@pytest.mark.parametrize("kind", ["plt_skip", "clt"])
def test_implementations_agree(kind: str) -> None:
    assert_agrees_with_reference("native", kind)


@pytest.mark.parametrize("kind", ["plt_skip", "clt"])
def test_parameters_of_modules_as_weights(kind: str) -> None:
    """A trace records no autograd graph, even if weights are parameters."""
    plain = replacement("llama", kind, torch.float32)
    t, prompt = plain.transcoders, builders.prompt()
    lists = [[None if w is None else torch.nn.Parameter(w.clone()) for w in getattr(t, name)] for name in WEIGHTS]
    rules = [pc.JumpReLU(torch.nn.Parameter(r.theta)) if isinstance(r, pc.JumpReLU) else r for r in t.activation]
    taught = type(t)(*lists[:4], rules, lists[4], t.reads, t.writes)
    model = pc.ReplacementModel(plain.hf_model, taught)
    graph, expected = (pc.attribute(m, prompt, progress=False) for m in (model, plain))
    assert torch.equal(graph.rows.weight, expected.rows.weight) and torch.equal(graph.bias, expected.bias)
    after = pc.intervene(model, prompt, [pc.Intervention(0, 3, 5, 1.0)])
    assert not any(
        out.requires_grad for out in (graph.rows.weight, graph.bias, model.freeze(prompt).errors, after.logits)
    )


def expanded(graph: pc.Graph) -> list[int]:
    """Return the features that have a row, in the order of choice."""
    return graph.row_node[graph.row_node < len(graph.features)].tolist()


def test_one_round_takes_the_most_influential_on_the_targets() -> None:
    model = replacement("llama", "plt", torch.float32)
    few = pc.attribute(model, builders.prompt(), max_features=20, round_size=20)
    only_targets = pc.attribute(model, builders.prompt(), max_features=0)
    edges = only_targets.dense()[only_targets.row_node].double().abs()
    share = only_targets.targets.weights @ (edges / edges.sum(1, keepdim=True))
    assert set(expanded(few)) == set(share[: len(few.features)].topk(20).indices.tolist())
    places = few.features[expanded(few), :2].tolist()
    assert places == sorted(places, key=lambda place: (-place[0], place[1]))


def test_rounds_see_the_rows_before_and_are_deterministic() -> None:
    model = replacement("llama", "plt", torch.float32)
    first = pc.attribute(model, builders.prompt(), max_features=5, round_size=5)
    graphs = [pc.attribute(model, builders.prompt(), max_features=20, round_size=5) for _ in range(2)]
    chosen, again = (expanded(g) for g in graphs)
    assert chosen == again and len(set(chosen)) == 20 and chosen[:5] == expanded(first)
    assert torch.equal(graphs[0].rows.weight, graphs[1].rows.weight)
    influence = first.influence()[: len(first.features)]
    influence[chosen[:5]] = -1
    assert set(chosen[5:10]) == set(influence.topk(5).indices.tolist())


def test_targets_of_every_kind() -> None:
    model = replacement("llama", "plt", torch.float32)
    local = model.freeze(builders.prompt())
    f = local.features[2]
    feature = pc.Feature(2, int(f.position()[0]), int(f.index[0]))
    direction = ("3 - 5", 0.5, local.model.unembedding[3] - local.model.unembedding[5])
    graph = pc.attribute(model, builders.prompt(), targets=[7, direction, feature], max_features=0)
    assert list(graph.targets.labels) == ["7", "3 - 5", f"layer 2 feature {feature.feature}"]
    assert graph.targets.ids.tolist() == [7, -1, -1] and graph.certificate < 1e-5
    logits = local.model.logits()[-1]
    assert float(graph.preactivation[1]) == pytest.approx(float(logits[3] - logits[5]), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": 99}, "position must be from -13 to 12, got 99"),
        ({"targets": [61]}, "token ids from 0 to 60, got 61"),
        ({"targets": []}, "at least one target"),
        ({"targets": [("x", 1.0, torch.zeros(3))]}, r"shape \[32\], got \[3\]"),
        ({"targets": [("x", -1.0, torch.zeros(32))]}, "a direction's weight must be finite and not negative, got -1"),
        (
            {"targets": [("x", 1.0, torch.full((32,), torch.nan))]},
            "direction must be finite, got NaN",
        ),
        ({"targets": [pc.Feature(0, 0, 0)]}, "must be active on this prompt"),
        ({"targets": [pc.Feature(9, 0, 0)]}, "layer below 3"),
        ({"probability": 0.0}, "probability must be above 0"),
        ({"max_targets": 0}, "max_targets must be an int of at least 1"),
        ({"max_features": -1}, "max_features must not be negative, got -1"),
    ],
)
def test_bad_arguments_name_the_rule(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sweep, "tile", lambda *_: pytest.fail("refused too late"))
    with pytest.raises(ValueError, match=message):
        pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), **changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt_oss"])
def test_trace_on_gpu(family: str, kind: str) -> None:
    """A trace through Triton keeps the law and has the edges of the CPU."""
    truth = pc.attribute(replacement(family, kind, torch.float32), builders.prompt(), max_targets=3, progress=False)
    there = pc.ReplacementModel(builders.build(family).cuda(), transcoders(kind, torch.float32).to("cuda"))
    graph = pc.attribute(there, builders.prompt(), max_targets=3, max_features=20, progress=False)
    assert pc.last_run().implementation == "triton" and graph.certificate < 1e-5
    edges, expected = common_edges(graph, truth)
    assert len(edges) > 0.9 * graph.rows.count
    assert float(((edges - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-4


def common_edges(graph: pc.Graph, other: pc.Graph) -> tuple[Tensor, Tensor]:
    """Return the edges that two graphs share: a feature within rounding of its threshold may be in one alone.

    The errors that it may write to then hold its share and are left out.
    """
    nodes = [_nodes_by_name(g) for g in (graph, other)]
    differ = [name[1:3] for name in nodes[0].keys() ^ nodes[1].keys()]
    errors = {("error", layer, position) for first, position in differ for layer in range(first, graph.layers)}
    columns = [name for name in nodes[0] if name in nodes[1] and name not in errors]
    rows = [set(g.row_node.tolist()) for g in (graph, other)]
    both = [name for name in columns if all(n[name] in r for n, r in zip(nodes, rows, strict=True))]
    first, second = (
        g.dense()[[n[name] for name in both]][:, [n[name] for name in columns]]
        for g, n in zip((graph, other), nodes, strict=True)
    )
    return first, second


def _nodes_by_name(graph: pc.Graph) -> dict[tuple[Any, ...], int]:
    """Return nodes by names that do not depend on other features: layer, position and feature."""
    names: dict[tuple[Any, ...], int] = {}
    for node, numbers in enumerate(graph.features.tolist()):
        names[("feature", *numbers)] = node
    for layer in range(graph.layers):
        for position in range(graph.positions):
            names["error", layer, position] = graph.first_error + layer * graph.positions + position
    for node in range(graph.first_error + graph.layers * graph.positions, graph.nodes):
        names["end", graph.nodes - node] = node
    return names


def test_common_edges_of_graphs_that_differ_by_a_feature() -> None:
    """One more node in the middle changes no other row or column."""
    model = replacement("llama", "plt", torch.float32)
    graph = pc.attribute(model, builders.prompt(), max_targets=3, progress=False)
    value, node = graph.values.min(0)
    layer, position, index = graph.features[int(node)].tolist()
    thresholds = [torch.full((24,), 0.5) for _ in range(builders.LAYERS)]
    thresholds[layer][index] = float(value) * (1 + 1e-6)
    model.transcoders.activation = tuple(pc.JumpReLU(t) for t in thresholds)
    fewer = pc.attribute(model, builders.prompt(), max_targets=3, progress=False)
    assert len(fewer.features) == len(graph.features) - 1 and [layer, position, index] not in fewer.features.tolist()
    edges, expected = common_edges(fewer, graph)
    assert edges.shape == (fewer.rows.count, fewer.nodes - (builders.LAYERS - layer))
    torch.testing.assert_close(edges, expected, atol=1e-5, rtol=1e-5)
