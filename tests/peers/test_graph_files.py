"""circuit-tracer's saved graphs, read by us, and ours, read by it: there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from circuit_tracer.attribution.targets import CustomTarget
from circuit_tracer.graph import Graph as CircuitTracerGraph
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.utils.create_graph_files import create_nodes
from pair import (
    Kind,
    Size,
    Tokenizer,
    circuit_tracer_model,
    our_model,
    prompt,
    selected,
    trace_circuit_tracer,
    trace_ours,
)

import pycircuit as pc

SIZE, ACTIVE, K = Size(), 6, 30
FIELDS = ("adjacency_matrix", "active_features", "logit_probabilities", "input_tokens", "selected_features",
          "activation_values")  # fmt: skip


def theirs(kind: Kind, **options: Any) -> CircuitTracerGraph:
    model = circuit_tracer_model("llama", kind, SIZE, torch.float32, ACTIVE)
    settings = {"max_feature_nodes": K, "batch_size": 8, "verbose": False, **options}
    graph = trace_circuit_tracer(model, prompt(9, SIZE.vocabulary), **settings)
    graph.scan = "org/tiny"
    return graph


def same(got: CircuitTracerGraph, expected: CircuitTracerGraph) -> None:
    for name in FIELDS:
        a, b = getattr(got, name), getattr(expected, name)
        assert torch.equal(a, b.to(a.dtype)), name
    for name in ("input_string", "logit_targets", "vocab_size", "scan"):
        assert getattr(got, name) == getattr(expected, name), name
    for name in ("n_layers", "d_model", "d_vocab", "model_name", "tokenizer_name", "n_key_value_heads"):
        assert getattr(got.cfg, name) == getattr(expected.cfg, name), name


@pytest.mark.parametrize("kind", [Kind(), Kind(cross=True, reads="resid_mid")], ids=["plt", "clt"])
def test_theirs_there_and_back(tmp_path: Path, kind: Kind) -> None:
    """Read by us and written again their graph is what it was; what it says is what we say of it."""
    their_graph = theirs(kind)
    their_graph.to_pt(str(tmp_path / "theirs.pt"))
    ours = pc.Graph.from_circuit_tracer(tmp_path / "theirs.pt", Tokenizer(SIZE.vocabulary))
    ours.to_circuit_tracer(tmp_path / "back.pt")
    same(CircuitTracerGraph.from_pt(str(tmp_path / "back.pt")), their_graph)
    scores, pruned, (node_mask, edge_mask, _) = ours.scores(), ours.prune(), prune_graph(their_graph)
    torch.testing.assert_close(torch.tensor(list(scores)), torch.tensor(compute_graph_scores(their_graph)))
    remaining = torch.cat([their_graph.selected_features, torch.arange(ours.first_error, ours.nodes)])
    assert torch.equal(pruned.node_mask[remaining], node_mask) and int(pruned.edge_mask.sum()) == int(edge_mask.sum())


def test_of_directions(tmp_path: Path) -> None:
    """Targets that are no tokens."""
    ways = [CustomTarget("one", 0.7, torch.randn(SIZE.width)), CustomTarget("two", 0.3, torch.randn(SIZE.width))]
    their_graph = theirs(Kind(), attribution_targets=ways)
    their_graph.to_pt(str(tmp_path / "theirs.pt"))
    ours = pc.Graph.from_circuit_tracer(tmp_path / "theirs.pt")
    assert ours.targets.labels == ["one", "two"] and ours.targets.ids.tolist() == [-1, -1]
    ours.to_circuit_tracer(tmp_path / "back.pt")
    same(CircuitTracerGraph.from_pt(str(tmp_path / "back.pt")), their_graph)


def test_ours_in_their_hands(tmp_path: Path) -> None:
    """A graph of ours: their Graph, prune and scores work on it, and agree."""
    kind = Kind()
    model = our_model("llama", kind, SIZE, torch.float32, ACTIVE)
    graph = trace_ours(model, prompt(9, SIZE.vocabulary), max_features=K)
    graph.to_circuit_tracer(tmp_path / "ours.pt", tokenizer_name="org/tokenizer", scan="org/tiny")
    read, ours = CircuitTracerGraph.from_pt(str(tmp_path / "ours.pt")), selected(graph)
    assert read.cfg.tokenizer_name == "org/tokenizer" and read.cfg.n_layers == SIZE.layers
    assert len(read.selected_features) == K == len(ours.features)
    torch.testing.assert_close(torch.tensor(list(ours.scores())), torch.tensor(compute_graph_scores(read)))
    pruned, (node_mask, _, cumulative) = ours.prune(), prune_graph(read)
    assert torch.equal(pruned.node_mask, node_mask)
    assert len(create_nodes(read, node_mask, model.tokenizer, cumulative)) == int(node_mask.sum())


def test_an_earlier_position_is_the_last_of_a_shorter_prompt(tmp_path: Path) -> None:
    """A target at an earlier position cannot be written, but the shorter prompt's graph has the same edges."""
    model, ids = our_model("llama", Kind(), SIZE, torch.float64, ACTIVE), prompt(9, SIZE.vocabulary)
    full = pc.attribute(model, ids, targets=[7, 3], position=4, max_features=0, progress=False)
    with pytest.raises(ValueError, match=r"at the last position, 8, .*; trace the prompt up to a position"):
        full.to_circuit_tracer(tmp_path / "g.pt")
    shorter = pc.attribute(model, ids[:5], targets=[7, 3], max_features=0, progress=False)
    shorter.to_circuit_tracer(tmp_path / "g.pt")
    there = full.features[:, 1] <= 4
    assert torch.equal(full.features[there], shorter.features) and not bool(there.all())
    dense = full.dense()[-2:, : len(there)]
    assert torch.allclose(dense[:, there], shorter.dense()[-2:, : len(shorter.features)], rtol=1e-10, atol=1e-12)
    assert not dense[:, ~there].any()
