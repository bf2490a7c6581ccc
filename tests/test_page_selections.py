"""Selections on the page: scores, groups, comparison of two graphs; large graphs; the server's own life."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import by_hand, cone_graph, random_graph
from page_client import Client, serving

import pycircuit as pc
from pycircuit.graph import Targets
from pycircuit.graph.identifiers import identifiers
from pycircuit.page import views
from pycircuit.page.graph_index import GraphIndex, significant
from pycircuit.page.json_bytes import encoded
from pycircuit.page.node_ids import node_of
from pycircuit.page.side_by_side import compare

pytestmark = pytest.mark.usefixtures("one_thread")
GRAPH = "/api/graphs/random.safetensors"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("graphs")
    random_graph().save(folder / "random.safetensors")
    random_graph(seed=1).save(folder / "other.safetensors")
    with serving(folder) as client:
        yield client


def test_scores_of_a_selection_are_the_graphs(client: Client) -> None:
    graph = random_graph()
    names = list(identifiers(graph, range(graph.first_error)))
    every = client.post(f"{GRAPH}/scores", {"nodes": names})
    assert every["replacement"] == pytest.approx(graph.scores().replacement)
    few = client.post(f"{GRAPH}/scores", {"nodes": [*names[:5], "0/0/99999", "token/0"]})
    assert few == dict(graph.subgraph_scores(range(5))._asdict())
    assert client.call("POST", f"{GRAPH}/scores", {"nodes": ["x"]})[0] == 400


@pytest.mark.parametrize("method", ["label", "structure"])
def test_groups_leave_fixed_ones_as_they_are(client: Client, method: str) -> None:
    graph = random_graph()
    names = list(identifiers(graph, range(graph.first_error)))
    body = {"nodes": names[2:], "fixed": {"mine": names[:2]}, "method": method}
    groups = client.post(f"{GRAPH}/group", body)["groups"]
    assert {"name": "mine", "nodes": names[:2]} in groups
    members = [node for group in groups for node in group["nodes"]]
    assert len(members) == len(set(members)) and set(members) <= set(names)
    assert client.call("POST", f"{GRAPH}/group", {"method": "magic"})[0] == 400


def test_only_selected_nodes_are_grouped(client: Client) -> None:
    names = list(identifiers(random_graph(), range(8)))
    groups = client.post(f"{GRAPH}/group", {"nodes": names, "method": "structure"})["groups"]
    assert {node for group in groups for node in group["nodes"]} <= set(names)
    assert client.post(f"{GRAPH}/group", {"method": "structure"})["groups"]  # of all that pruning keeps


def test_a_comparison_with_itself_finds_no_difference(client: Client) -> None:
    same = client.get("/api/compare?a=random.safetensors&b=random.safetensors")
    assert not same["only_a"] and not same["only_b"] and same["edges"]["only_a"] == same["edges"]["only_b"] == 0
    assert all(pair["influence_change"] == 0 for pair in same["both"])
    assert same["summary"]["similarity"] == 1
    assert client.call("GET", "/api/compare?a=random.safetensors&b=none.safetensors")[0] == 404
    assert client.call("GET", "/api/compare?a=random.safetensors&b=other.safetensors&align=x")[0] == 400


def test_a_comparison_names_what_each_graph_has_alone(client: Client) -> None:
    a, b = random_graph(), random_graph(seed=1)
    result = client.get("/api/compare?a=random.safetensors&b=other.safetensors&node_threshold=1&edge_threshold=1")
    names = [set(identifiers(g, range(g.nodes))) for g in (a, b)]
    pruned = [set(identifiers(g, g.prune(1, 1).node_mask.nonzero()[:, 0].tolist())) for g in (a, b)]
    inner = [{name for name in side if not name.startswith(("token", "target"))} for side in names]
    alone = [{entry["node"]["id"] for entry in result[key]} for key in ("only_a", "only_b")]
    assert [side & inner[i] for i, side in enumerate(alone)] == [
        pruned[i] & inner[i] - inner[1 - i] for i in (0, 1)
    ]  # fmt: skip
    assert {pair["a"]["id"] for pair in result["both"]} & inner[0] == (pruned[0] | pruned[1]) & inner[0] & inner[1]
    influence = [g.influence() / g.targets.weights.sum() for g in (a, b)]
    for pair in result["both"]:
        if pair["a"]["kind"] in ("feature", "error"):
            change = [float(influence[i][node_of(g, pair["a"]["id"])]) for i, g in enumerate((a, b))]
            assert pair["influence_change"] == pytest.approx(change[1] - change[0], rel=1e-4, abs=1e-9)
    edges = [[edge[end].split()[-1] for end in ("target", "source")] for edge in result["edges"]["changed"]]
    named = [i for i, ends in enumerate(edges) if all("/" in end for end in ends)]
    assert named
    for i in named[:20]:
        edge, ends = result["edges"]["changed"][i], edges[i]
        dense = [float(g.dense()[tuple(node_of(g, end) for end in ends)]) for g in (a, b)]
        assert [edge["a"], edge["b"]] == pytest.approx(dense, rel=1e-4, abs=1e-9)


def test_features_are_aligned_across_positions() -> None:
    graph = random_graph(positions=3)
    moved = replace(graph)
    features = graph.features.clone()
    features[:, 1] = (features[:, 1] + 1) % 3
    object.__setattr__(moved, "features", features)  # every feature one position on, with the edges it had
    sides = GraphIndex(graph), GraphIndex(moved)
    alone = {align: [n for n in compare(*sides, align, (1, 1))["only_a"] if n["node"]["kind"] == "feature"]
             for align in ("position", "feature")}  # fmt: skip
    assert alone["position"] and not alone["feature"]
    pairs = [pair for pair in compare(*sides, "feature", (1, 1))["both"] if pair["a"]["kind"] == "feature"]
    assert pairs and all(pair["influence_change"] == pytest.approx(0, abs=1e-12) for pair in pairs)


def test_targets_that_mean_the_same_are_aligned() -> None:
    graph = by_hand()
    targets = graph.targets
    spaced = replace(graph, targets=Targets(["t0 "], targets.ids, targets.weights, targets.positions))
    both = compare(GraphIndex(graph), GraphIndex(spaced), "position", (1, 1))["both"]
    assert "target/0" in {pair["b"]["id"] for pair in both}


def test_first_thresholds_show_what_can_be_read() -> None:
    small, large = GraphIndex(random_graph()), GraphIndex(cone_graph(12, 26, 12, 1500))
    assert views.first_thresholds(small) == (0.8, 0.98)
    node, edge = views.first_thresholds(large)
    shown = [n for n in views.view(large.graph, node, edge, index=large)["nodes"] if n["kind"] == "feature"]
    everything = [n for n in views.view(large.graph, index=large)["nodes"] if n["kind"] == "feature"]
    assert node < 0.8 and edge < 0.98 and len(shown) <= views.LEGIBLE + 1 < len(everything)


def test_a_large_view_is_made_and_written_quickly() -> None:
    graph = cone_graph(12, 26, 12, 1500)
    index = GraphIndex(graph)
    begin = time.process_time()
    content = views.view(graph, 0.9, 0.98, 2000, index=index)
    text = encoded(content)
    spent = time.process_time() - begin
    assert len(content["nodes"]) > 1000 and len(content["edges"]["weight"]) == views.MAX_EDGES
    assert len(text) < 2_500_000 and spent < 1.0
    begin = time.process_time()
    encoded(content)
    assert time.process_time() - begin < 0.3


def test_numbers_are_short_and_right() -> None:
    values = np.array([0.0, 1.0, -2.5e-30, 1234567.89, 3.14159265358979, np.pi * 1e200, -1e-310])
    rounded = significant(values)
    np.testing.assert_allclose(rounded, values, rtol=5e-6)
    assert rounded[4] == 3.14159 and rounded[3] == 1234570 and rounded[0] == 0


def test_the_next_free_port_is_taken_and_an_asked_one_must_be_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("pycircuit.page.server.PORT", port)
        with pc.serve(tmp_path) as page:
            assert page.address != f"http://127.0.0.1:{port}/"
        with pytest.raises(OSError, match="serve: port must be one that is free"):
            pc.serve(tmp_path, port=port)


def test_a_stopped_server_answers_no_more(tmp_path: Path) -> None:
    page = pc.serve(tmp_path, port=0)
    client = Client(page)
    assert client.get("/api/state")["graphs"] == []
    page.stop()
    page.stop()  # twice is once
    with pytest.raises(OSError):
        client.get("/api/state")


def test_sources_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="serve: source must be a folder of graphs or"):
        pc.serve(tmp_path / "nothing")
    with pytest.raises(TypeError, match="serve: source must be a folder or a model, got int"):
        pc.serve(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="serve: folder must go with a model"):
        pc.serve(tmp_path, folder=tmp_path)
    with pytest.raises(ValueError, match="serve: examples must be a folder"):
        pc.serve(tmp_path, examples=tmp_path)


def test_without_its_packages_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycircuit.page.server.find_spec", lambda name: None if name == "starlette" else name)
    with pytest.raises(ModuleNotFoundError, match=r"starlette must be installed.*pycircuit\[page\]"):
        pc.serve(tmp_path)
