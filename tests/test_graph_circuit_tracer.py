"""Tests of circuit-tracer's `.pt` graphs, read and written without circuit-tracer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from circuit_tracer_files import (
    VOCABULARY,
    HookedTransformerConfig,
    LogitTarget,
    Tokenizer,
    UnifiedConfig,
    content,
    installed_classes,
    saved,
)
from graphs import by_hand, random_graph
from torch import Tensor

from pycircuit.graph import Graph, GraphFileError, Rows, Targets

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def remove_classes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Function that removes the stand-ins for circuit-tracer's classes, which are there until then."""
    with installed_classes(monkeypatch) as remove:
        yield remove


def test_a_file_as_theirs(tmp_path: Path, remove_classes: Callable[[], None]) -> None:
    path = saved(tmp_path / "g.pt")
    remove_classes()  # read without their library
    assert "circuit_tracer" not in sys.modules
    graph = Graph.from_circuit_tracer(path, Tokenizer())
    assert graph.features.tolist() == [[0, 1, 3], [0, 1, 4], [1, 1, 5]] and graph.values.tolist() == [1, 2, 4]
    assert (graph.layers, graph.positions, graph.vocab_size, graph.prompt) == (2, 2, VOCABULARY, "<bos>a")
    assert graph.tokens.ids.tolist() == [2, 9] and graph.tokens.text == ["<bos>", "a"]
    assert graph.targets.labels == [" b", "b - c"] and graph.targets.ids.tolist() == [7, -1]
    assert graph.targets.weights.tolist() == [0.75, 0.25] and graph.targets.positions.tolist() == [1, 1]
    dense, f, e, t, g = graph.dense(), graph.feature_node, graph.error_node, graph.token_node, graph.target_node
    low, high = f(0, 1, 3), f(1, 1, 5)
    expected = torch.zeros_like(dense)
    for (into, source), weight in {
        (low, t(0)): 0.5, (high, low): 2.0, (high, e(0, 0)): -1.0, (high, t(1)): 0.25, (g(0), low): 1.5,
        (g(0), high): 3.0, (g(1), high): -2.0, (g(1), e(1, 1)): 1.0,
    }.items():  # fmt: skip
        expected[into, source] = weight
    assert torch.equal(dense, expected)
    assert graph.row_node.tolist() == [low, high, g(0), g(1)]
    assert graph.provenance["model"] == "org/model" and graph.provenance["scan"] == "org/transcoders"


def test_nothing_is_claimed_of_the_law(tmp_path: Path) -> None:
    graph = Graph.from_circuit_tracer(saved(tmp_path / "g.pt"))
    for variant in (graph, graph.prune(1, 1).graph):
        assert np.isnan(variant.certificate) and bool(variant.residual.isnan().all())
    graph.save(tmp_path / "g.safetensors")
    assert np.isnan(Graph.load(tmp_path / "g.safetensors").certificate)


def test_a_file_outlives_nothing(tmp_path: Path) -> None:
    """A graph stays valid when its file is overwritten."""
    doubles = {name: content()[name].double() for name in ("activation_values", "logit_probabilities")}
    path = saved(tmp_path / "g.pt", active_features=content()["active_features"].contiguous(), **doubles)
    graph = Graph.from_circuit_tracer(path)
    before = graph.dense()
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(graph.dense(), before) and graph.values.tolist() == [1, 2, 4]
    assert graph.features.tolist() == [[0, 1, 3], [0, 1, 4], [1, 1, 5]]
    assert graph.targets.weights.tolist() == [0.75, 0.25]
    assert graph.tokens.text == ["2", "9"] and graph.tokens.ids.tolist() == [2, 9]


def old_config() -> Any:
    config = HookedTransformerConfig(attn_scale=np.sqrt(4.0), device=torch.device("cpu"))
    del config.original_architecture
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {"cfg": old_config()},
        {"logit_targets": torch.tensor([7, 8])},
        {"logit_targets": None, "logit_tokens": torch.tensor([7, 8])},
        {"vocab_size": None, "scan": None},
        {"scan": ["one", "two"], "adjacency_matrix": content()["adjacency_matrix"].to(torch.bfloat16)},
        {"logit_probabilities": torch.tensor([0.75, 0.25], dtype=torch.bfloat16, requires_grad=True)},
    ],
    ids=["old_config", "target_ids", "older_target_ids", "no_scan", "scans_and_bfloat16", "with_gradient"],
)
def test_files_of_other_versions(tmp_path: Path, remove_classes: Callable[[], None], changes: dict[str, Any]) -> None:
    path = saved(tmp_path / "g.pt", **changes)
    remove_classes()
    graph, usual = Graph.from_circuit_tracer(path, Tokenizer()), content()
    assert graph.layers == 2 and graph.rows.entries == 8 and graph.vocab_size == VOCABULARY
    assert graph.targets.ids.tolist()[0] == 7 and graph.rows.weight.dtype == torch.float32
    assert graph.targets.labels[0] == ("<7>" if "logit_targets" in changes else " b")
    assert graph.provenance.get("scan") == changes.get("scan", usual["scan"])


@pytest.mark.parametrize("names", ["org/new", ["org/one", "org/two"]], ids=["one", "several"])
def test_files_that_say_scan_name_keep_it(tmp_path: Path, names: Any) -> None:
    """As circuit-tracer writes since July 2026, and as every version of it reads again."""
    graph = Graph.from_circuit_tracer(saved(tmp_path / "g.pt", scan=None, scan_name=names))
    assert graph.provenance["scan"] == names
    graph.to_circuit_tracer(tmp_path / "again.pt")
    assert torch.load(tmp_path / "again.pt", weights_only=False)["scan"] == names
    with pytest.raises(GraphFileError, match="scan must be a string or a list of strings, got dict"):
        Graph.from_circuit_tracer(saved(tmp_path / "g.pt", scan=None, scan_name={}))


def test_the_same_graph_has_the_same_bytes(tmp_path: Path) -> None:
    """Under any name, from any process, and after it was saved and loaded."""
    graph = random_graph()
    graph.save(tmp_path / "g.safetensors")
    for name, of in (("a", graph), ("a_longer_name", graph), ("loaded", Graph.load(tmp_path / "g.safetensors"))):
        of.to_circuit_tracer(tmp_path / f"{name}.pt")
    first, *others = (path.read_bytes() for path in sorted(tmp_path.glob("*.pt")))
    assert all(data == first for data in others)
    assert str(os.getpid()).encode() not in first


def test_selected_features_in_any_order(tmp_path: Path) -> None:
    usual, turned = content(), content()
    swap = torch.tensor([1, 0, *range(2, 10)])
    turned["selected_features"] = turned["selected_features"].flip(0)
    turned["adjacency_matrix"] = turned["adjacency_matrix"][swap][:, swap]
    graphs = [Graph.from_circuit_tracer(saved(tmp_path / "g.pt", **c)) for c in (usual, turned)]
    assert torch.equal(graphs[0].dense(), graphs[1].dense())


def test_written_for_them(tmp_path: Path) -> None:
    """With their classes as pickle finds them, as their own from_pt opens it."""
    graph = random_graph(targets=3)
    last = torch.full((3,), graph.positions - 1)
    graph = replace(graph, targets=replace(graph.targets, ids=torch.tensor([40, -1, 42]), positions=last))
    graph.to_circuit_tracer(tmp_path / "g.pt", tokenizer_name="org/t")
    graph_file = torch.load(tmp_path / "g.pt", weights_only=False)
    assert list(graph_file) == list(content())
    assert type(graph_file["cfg"]) is UnifiedConfig and type(graph_file["logit_targets"][0]) is LogitTarget
    assert (graph_file["cfg"].n_layers, graph_file["cfg"].d_vocab, graph_file["cfg"].tokenizer_name) == (
        4,
        100,
        "org/t",
    )
    assert graph_file["logit_targets"] == [(" t0", 40), (" t1", 101), (" t2", 42)]
    assert torch.equal(graph_file["active_features"], graph.features) and graph_file["scan"] == "set"
    selected = graph_file["selected_features"]
    assert 0 < len(selected) < len(graph.features)
    nodes = torch.cat([selected, torch.arange(graph.first_error, graph.nodes)])
    assert torch.equal(graph_file["adjacency_matrix"], graph.dense()[nodes][:, nodes])


def without_others(graph: Graph) -> Tensor:
    """Edges that a file of theirs has: from features that were selected, errors and tokens."""
    dense = graph.dense()
    out = torch.zeros(graph.nodes, dtype=torch.bool)
    out[graph.row_node] = True
    out[graph.first_error :] = True
    dense[:, ~out] = 0
    return dense


@pytest.mark.parametrize("seed", range(3))
def test_there_and_back(tmp_path: Path, seed: int) -> None:
    graph = random_graph(count=40, seed=seed)
    graph.to_circuit_tracer(tmp_path / "a.pt")
    again = Graph.from_circuit_tracer(tmp_path / "a.pt")
    assert torch.equal(again.features, graph.features) and torch.equal(again.values, graph.values)
    assert torch.equal(again.dense(), without_others(graph))
    assert again.targets.labels == graph.targets.labels and torch.equal(again.targets.ids, graph.targets.ids)
    again.to_circuit_tracer(tmp_path / "b.pt")
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=False) for n in "ab")
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name], name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    graph = by_hand()
    with pytest.raises(TypeError, match=r"Graph\.to_circuit_tracer: scan must be a string, got int"):
        graph.to_circuit_tracer(tmp_path / "g.pt", scan=3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"Graph\.to_circuit_tracer: path must be in a folder that exists"):
        graph.to_circuit_tracer(tmp_path / "no" / "g.pt")
    early = random_graph(positions=3)
    targets = Targets(early.targets.labels, early.targets.ids, early.targets.weights, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"targets must be at the last position, 2, as .* got \[1, 2\]"):
        replace(early, targets=targets).to_circuit_tracer(tmp_path / "g.pt")
    assert list(tmp_path.iterdir()) == [] and isinstance(graph.rows, Rows)
