"""Tests of the drop-in for circuit-tracer: pruning, files, the tutorial and the page of the documentation."""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pair
import pytest
import torch
from circuit_tracer import attribute as circuit_tracer_attribute
from circuit_tracer.graph import Graph, compute_graph_scores, prune_graph
from circuit_tracer.utils import create_graph_files
from drop_in_cases import FEW, SIZE, both, ids, plain, same

from pycircuit.integrations.circuit_tracer import (
    attribute,
)


@FEW
def test_the_same_nodes_edges_and_scores(where: str) -> None:
    theirs, ours = both(where)
    for node, edge in ((0.8, 0.98), (0.95, 0.99)):
        pruned = prune_graph(ours, node, edge), prune_graph(theirs, node, edge)
        assert torch.equal(pruned[0].node_mask, pruned[1].node_mask) and pruned[0].node_mask.any()
        assert torch.equal(pruned[0].edge_mask, pruned[1].edge_mask)
        assert torch.allclose(pruned[0].cumulative_scores, pruned[1].cumulative_scores, atol=1e-5)
    assert compute_graph_scores(ours) == pytest.approx(compute_graph_scores(theirs), rel=1e-5)


@pytest.fixture
def local_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local:
        @staticmethod
        def from_pretrained(_: Any) -> pair.Tokenizer:
            return pair.Tokenizer(SIZE.vocabulary)

    monkeypatch.setattr(sys.modules[create_graph_files.__module__], "AutoTokenizer", Local)


def written(graph: Graph, folder: Path) -> dict[str, Any]:
    create_graph_files(graph, "tiny", str(folder), scan="tiny", node_threshold=0.97, edge_threshold=0.99)
    return json.loads((folder / "tiny.json").read_text())


def alike(ours: Any, theirs: Any) -> None:
    """Files of the same structure and, to float32, of the same values."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            alike(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for pair_of in zip(ours, theirs, strict=True):
            alike(*pair_of)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    else:
        assert ours == theirs


@FEW
@pytest.mark.usefixtures("local_tokenizer")
def test_the_same_files(where: str, tmp_path: Path) -> None:
    theirs, ours = both(where)
    files = written(ours, tmp_path / "ours"), written(theirs, tmp_path / "theirs")
    assert len(files[1]["nodes"]) > 30 and len(files[1]["links"]) > 100
    for content in files:  # those below a digit's noise may change places
        content["nodes"].sort(key=lambda n: n["node_id"] + n["feature_type"])
        content["links"].sort(key=lambda e: (e["source"], e["target"], e["weight"]))
    alike(*files)


def test_saved_and_loaded(tmp_path: Path) -> None:
    _, ours = both("lens llama")
    ours.to_pt(str(tmp_path / "graph.pt"))
    again = Graph.from_pt(str(tmp_path / "graph.pt"))
    same(again, ours, 1e-12)
    assert torch.equal(again.adjacency_matrix, ours.adjacency_matrix)


TUTORIAL = """
from circuit_tracer.graph import Graph, compute_graph_scores, prune_graph
from circuit_tracer.utils import create_graph_files

graph = attribute(
    prompt=prompt, model=model, max_n_logits=5, desired_logit_prob=0.9, batch_size=8, max_feature_nodes=40,
    offload=None, verbose=False,
)
graph.to_pt(folder + "/graph.pt")
create_graph_files(folder + "/graph.pt", slug="tiny", scan="tiny", output_path=folder, node_threshold=0.97)
pruned = prune_graph(Graph.from_pt(folder + "/graph.pt"), node_threshold=0.97)
features = len(graph.selected_features)
strongest = int(pruned.cumulative_scores[:features].argmin())
layer, position, feature = graph.active_features[graph.selected_features[strongest]].tolist()
value = graph.activation_values[graph.selected_features[strongest]]
before, _ = model.get_activations(graph.input_tokens)
after, _ = model.feature_intervention(graph.input_tokens, [(layer, position, feature, -2 * value)])
scores = compute_graph_scores(graph)
"""


@FEW
@pytest.mark.usefixtures("local_tokenizer")
def test_their_tutorial_by_one_changed_line(where: str, tmp_path: Path) -> None:
    namespaces = []
    for index, line in enumerate(
        ("from circuit_tracer import attribute", "from pycircuit.integrations.circuit_tracer import attribute")
    ):
        names: dict[str, Any] = {"prompt": ids(), "model": plain(where), "folder": str(tmp_path / str(index))}
        Path(names["folder"]).mkdir()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            exec(compile(line + TUTORIAL, "tutorial", "exec"), names)
        namespaces.append(names)
    theirs, ours = namespaces
    assert ours["attribute"] is attribute and theirs["attribute"] is circuit_tracer_attribute
    assert [ours[n] for n in ("layer", "position", "feature")] == [theirs[n] for n in ("layer", "position", "feature")]
    assert torch.equal(ours["pruned"].node_mask, theirs["pruned"].node_mask)
    assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-5)
    assert torch.allclose(ours["after"], theirs["after"], atol=1e-4)
    assert not torch.allclose(ours["after"], ours["before"], atol=1e-2)


def test_the_same_arguments_and_defaults() -> None:
    parameters = [inspect.signature(f).parameters.values() for f in (attribute, circuit_tracer_attribute)]
    assert [(p.name, p.kind, p.default) for p in parameters[0]] == [(p.name, p.kind, p.default) for p in parameters[1]]


PAGE = Path(__file__).parents[2] / "docs" / "circuit-tracer.md"


@FEW
def test_the_page_runs(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    blocks = re.findall(r"```py\n(.*?)```", text, re.S)
    names: dict[str, Any] = {"model": plain(where), "prompt": ids(), "__name__": "a_users_page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number}", "exec"), names)
    assert len(blocks) == 2 and Graph.from_pt("graph.pt").selected_features.numel() == 40
    table = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert re.findall(r"`(\w+)`", table) == [p for p in ORDER if p != "model"]
    assert sorted(ORDER) == sorted(inspect.signature(attribute).parameters)


# The page's order of the arguments.
ORDER = (
    "prompt", "model", "attribution_targets", "max_n_logits", "desired_logit_prob", "max_feature_nodes", "batch_size",
    "update_interval", "offload", "verbose",
)  # fmt: skip
