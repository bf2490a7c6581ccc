"""The page's server over real sockets: graphs, views, nodes, paths, search and edits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from graphs import by_hand, random_graph
from page_client import Client, serving

from pycircuit.graph.identifiers import identifiers
from pycircuit.page import views
from pycircuit.page.node_ids import node_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs")
    by_hand().save(path / "hand.safetensors")
    random_graph().save(path / "random.safetensors")
    random_graph().to_circuit_tracer(path / "foreign.pt")
    (path / "broken.safetensors").write_bytes(b"no graph")
    (path / "notes.txt").write_text("no graph")
    return path


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with serving(folder) as client:
        yield client


def test_state_lists_the_graphs_of_the_folder(client: Client) -> None:
    state = client.get("/api/state")
    graphs = {graph["name"]: graph for graph in state["graphs"]}
    assert list(graphs) == ["broken.safetensors", "foreign.pt", "hand.safetensors", "random.safetensors"]
    assert graphs["hand.safetensors"]["title"] == " w0" and graphs["hand.safetensors"]["features"] == 2
    assert graphs["hand.safetensors"]["tokens"] == 1 and state["model"] is None
    status, content = client.call("GET", "/api/graphs/broken.safetensors")
    assert status == 400 and "Graph.load" in content["error"]
    assert client.get("/api/state")["graphs"][0]["error"] == content["error"]


def test_view_is_the_pruned_graph(client: Client) -> None:
    graph = random_graph()
    view = client.get("/api/graphs/random.safetensors?node_threshold=0.7&edge_threshold=0.9")
    pruned = graph.prune(0.7, 0.9)
    nodes = pruned.node_mask.nonzero()[:, 0].numpy()
    assert [node["id"] for node in view["nodes"]] == list(identifiers(graph, nodes.tolist()))
    assert view["pruned"] == {"nodes": len(nodes), "edges": int(pruned.edge_mask.sum())}
    dense, edges = graph.dense().numpy(), view["edges"]
    ends = [nodes[edges[name]] for name in ("source", "target")]
    assert len(ends[0]) == int(pruned.edge_mask.sum())
    np.testing.assert_allclose(edges["weight"], dense[ends[1], ends[0]], rtol=1e-5)
    expected = np.abs(dense[ends[1], ends[0]]) / np.abs(dense).sum(1)[ends[1]]
    np.testing.assert_allclose(edges["share"], expected, rtol=1e-5)
    assert view["scores"]["replacement"] == graph.scores().replacement


def test_view_is_bounded(client: Client) -> None:
    view = client.get("/api/graphs/random.safetensors?node_threshold=1&edge_threshold=1&max_nodes=10")
    graph, shown = random_graph(), view["nodes"]
    inner = [node_of(graph, node["id"]) for node in shown if node["kind"] in ("feature", "error")]
    assert len(shown) == 10 and len(inner) == 5  # beside 3 tokens and 2 targets
    influence = graph.influence()[: graph.first_token]
    assert sorted(inner) == sorted(influence.topk(5).indices.tolist())
    assert max(view["edges"]["source"]) < 10 and view["pruned"]["nodes"] > 10
    few = views.view(graph, 1, 1, max_edges=3)
    assert len(few["edges"]["weight"]) == 3


def test_node_has_its_inputs_and_outputs_in_the_graph(client: Client) -> None:
    content = client.get("/api/graphs/hand.safetensors/node?id=target/0")
    inputs = [(edge["node"]["id"], edge["weight"], edge["share"]) for edge in content["inputs"]]
    assert inputs == [("1/0/6", 3.0, 0.6), ("0/0/5", 1.0, 0.2), ("error/1/0", -1.0, 0.2)]
    assert content["totals"]["positive"] == 4 and content["totals"]["negative"] == -1
    outputs = client.get("/api/graphs/hand.safetensors/node?id=0/0/5")["outputs"]
    assert [(edge["node"]["id"], edge["weight"]) for edge in outputs] == [("1/0/6", 2.0), ("target/0", 1.0)]
    assert client.get("/api/graphs/hand.safetensors/node?id=token/0")["totals"]["explained"] is False


def test_paths_have_their_sign(client: Client) -> None:
    (path,) = client.get("/api/graphs/hand.safetensors/paths?source=error/1/0&target=target/0")["paths"]
    assert path["sign"] == -1 and path["strength"] == 0.2 and path["weights"] == [-1.0]
    two = client.get("/api/graphs/hand.safetensors/paths?source=token/0&target=target/0&k=9")["paths"]
    assert [node["id"] for node in two[0]["nodes"]] == ["token/0", "0/0/5", "1/0/6", "target/0"]


def test_search_finds_labels_tokens_and_identifiers(client: Client) -> None:
    def ids(text: str) -> list[str]:
        return [node["id"] for node in client.get(f"/api/graphs/hand.safetensors/search?q={text}")["nodes"]]

    assert ids("W0") == ["token/0"] and ids("t0") == ["target/0"]
    assert ids("1/6") == ids("1/0/6") == ids("6") == ["1/0/6"] and ids("error/1") == ["error/1/0"]
    document = client.get("/api/graphs/hand.safetensors/edits")
    document["document"]["labels"]["0/5"] = "capital cities"
    client.post("/api/graphs/hand.safetensors/edits", document, "PUT")
    assert ids("CAPITAL") == ["0/0/5"]


def test_edits_are_undone_redone_and_refused_when_stale(client: Client) -> None:
    address = "/api/graphs/random.safetensors/edits"
    state = client.get(address)
    for pins in (["token/0"], ["token/0", "token/1"]):
        state = client.post(address, {"revision": state["revision"], "document": {"pins": pins}}, "PUT")
    stale, conflict = client.call("PUT", address, {"revision": 0, "document": {}})
    assert stale == 409 and conflict["document"]["pins"] == ["token/0", "token/1"]
    undone = client.post(f"{address}/undo", {"revision": state["revision"]})
    assert undone["document"]["pins"] == ["token/0"] and undone["can_redo"]
    redone = client.post(f"{address}/redo", {"revision": undone["revision"]})
    assert redone["document"]["pins"] == ["token/0", "token/1"] and not redone["can_redo"]
    assert client.get(address) == redone
