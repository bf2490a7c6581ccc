"""Graphs of prompts under interventions: the conservation law, the changed run, and nothing that causes a change."""

from __future__ import annotations

import pytest
import torch
from builders import prompt, replacement

import pycircuit as pc

POSITION = 6


def active(model: pc.ReplacementModel, tokens: torch.Tensor, layer: int) -> tuple[int, float]:
    """Index and activation of a feature that is active in a layer at POSITION."""
    features = model.activations(tokens)[layer]
    begin = int(features.row_ptr[POSITION])
    return int(features.index[begin]), float(features.value[begin])


@pytest.mark.parametrize(("family", "kind"), [("llama", "clt"), ("gemma2", "plt_raw_topk"), ("gpt_neox", "plt_skip")])
def test_a_changed_graph_obeys_the_law_and_is_of_the_changed_run(family: str, kind: str) -> None:
    model = replacement(family, kind, torch.float64)
    tokens = prompt()
    scaled, _ = active(model, tokens, 0)
    ablated, _ = active(model, tokens, 1)
    changes = [
        pc.Intervention(0, POSITION, scaled, factor=3.0),
        pc.Intervention(1, POSITION, ablated, value=0.0),
        pc.Intervention(0, POSITION + 1, (scaled + 5) % 24, value=1.5),
    ]
    graph = pc.attribute_changed(model, tokens, changes, targets=[3, 7], max_features="all", progress=False)
    assert graph.certificate < 1e-10
    result = pc.intervene(model, tokens, changes, freeze="none")
    logits = result.logits[-1]
    if family != "gemma2":  # whose logits pass a softcap, which a graph does not have
        assert torch.allclose(graph.preactivation[:2], (logits - logits.mean())[[3, 7]], atol=1e-9)
    nodes = {tuple(key): float(value) for key, value in zip(graph.features.tolist(), graph.values, strict=True)}
    changed = {tuple(entry[:3]): entry[3] for entry in graph.provenance["interventions"]}
    assert (1, POSITION, ablated) not in nodes and nodes[0, POSITION + 1, (scaled + 5) % 24] == 1.5
    with_rows = {tuple(graph.features[node].tolist()) for node in graph.row_node.tolist() if node < graph.first_error}
    assert with_rows == set(nodes) - set(changed)
    for layer, features in enumerate(result.features):
        for position, index, value in zip(
            features.position().tolist(), features.index.tolist(), features.value.tolist(), strict=True
        ):
            if (layer, position, index) not in changed:
                assert nodes[layer, position, index] == pytest.approx(value, rel=1e-9)


def test_a_change_that_changes_nothing_gives_the_graph_itself() -> None:
    model = replacement("llama", "plt", torch.float64)
    tokens = prompt()
    index, value = active(model, tokens, 1)
    plain = pc.attribute(model, tokens, targets=[3], max_features="all", progress=False)
    changed = pc.attribute_changed(
        model, tokens, [pc.Intervention(1, POSITION, index, value=value)], targets=[3], max_features="all",
        progress=False,
    )  # fmt: skip
    rows = [i for i, node in enumerate(plain.row_node.tolist()) if node != plain.feature_node(1, POSITION, index)]
    order = {node: i for i, node in enumerate(changed.row_node.tolist())}
    assert torch.equal(plain.features, changed.features) and torch.allclose(plain.values, changed.values)
    for i in rows:
        own = changed.rows.row(order[int(plain.row_node[i])])
        assert torch.equal(plain.rows.row(i)[0], own[0])
        assert torch.allclose(plain.rows.row(i)[1], own[1], atol=1e-9)


def test_wrong_arguments_are_named() -> None:
    model = replacement("llama", "plt", torch.float64)
    with pytest.raises(ValueError, match="attribute_changed: interventions must have at least one"):
        pc.attribute_changed(model, prompt(), [], progress=False)
    with pytest.raises(ValueError, match="attribute_changed: position must be"):
        pc.attribute_changed(model, prompt(), [pc.Intervention(0, 99, 1, value=1.0)], progress=False)
