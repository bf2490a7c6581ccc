"""The page's server with the demo model: traces and their end, interventions, cards."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from page_client import EDITS, Client, serving

import pycircuit as pc
from pycircuit.page.foretold import agreement, foretold_changes
from pycircuit.page.trace_request import TraceRequest
from pycircuit.page.tracing_queue import QueueFull, TracingQueue

if TYPE_CHECKING:
    from commands import Run

pytestmark = pytest.mark.usefixtures("one_thread")
DALLAS = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def model() -> pc.ReplacementModel:
    return pc.load("demo")


@pytest.fixture(scope="module")
def graph(model: pc.ReplacementModel) -> pc.Graph:
    return pc.attribute(model, DALLAS, progress=False)


@pytest.fixture(scope="module")
def client(model: pc.ReplacementModel, graph: pc.Graph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("graphs")
    graph.save(folder / "dallas.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pycircuit.page.card_examples.STATEMENTS", 200)
        with serving(model, folder=folder, name="demo") as client:
            yield client


def events(client: Client, trace: str) -> Iterator[dict[str, Any]]:
    """Events of a trace as they come."""
    with closing(http.client.HTTPConnection(client.host, client.port, timeout=20)) as connection:
        connection.request("GET", f"/api/traces/{trace}/events")
        with closing(connection.getresponse()) as response:
            assert response.getheader("content-type", "").startswith("text/event-stream")
            while line := response.readline():
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])


def test_a_trace_is_estimated_streamed_and_saved(client: Client) -> None:
    request = {"prompt": DALLAS, "targets": [{"tokens": "Austin", "against": ["Sacramento"]}, "0/7/20"]}
    estimate = client.post("/api/estimate", request)
    assert estimate["bytes"] > 0 and estimate["seconds"] > 0 and "memory" in estimate["text"]
    trace = client.post("/api/traces", request)
    stream = list(events(client, trace["id"]))
    assert any(event.get("phase") == "forward" for event in stream) and "graph" in stream[-1]
    name = stream[-1]["graph"]
    assert name == "the-capital-of-the-state-containing-dallas-is.safetensors"
    view = client.get(f"/api/graphs/{name}")
    labels = [node["label"] for node in view["nodes"] if node["kind"] == "target"]
    assert len(labels) == 2 and "Sacramento" in labels[0]
    again = list(events(client, client.post("/api/traces", {"prompt": DALLAS})["id"]))[-1]["graph"]
    assert again == "the-capital-of-the-state-containing-dallas-is-2.safetensors"  # no graph is replaced


@pytest.mark.parametrize(
    "body",
    [{}, {"prompt": ""}, {"prompt": DALLAS, "targets": "Austin"}, {"prompt": DALLAS, "max_features": "9"},
     {"prompt": DALLAS, "name": "../x"}, {"prompt": DALLAS, "checkpoint": "/tmp"}, {"prompt": [9999999]},
     {"prompt": " ".join([DALLAS] * 9)}, {"prompt": DALLAS, "position": "last"}],
)  # fmt: skip
def test_a_trace_that_cannot_be_is_refused_at_once(client: Client, body: dict[str, Any]) -> None:
    status, content = client.call("POST", "/api/traces", body)
    assert status == 400 and "must" in content["error"]


def test_a_running_trace_is_cancelled_and_the_next_one_runs(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycircuit.trace.collect import RowCollector

    add_targets, entered, released = RowCollector.add_targets, threading.Event(), threading.Event()

    def held_up(collector: RowCollector) -> None:
        entered.set()
        assert released.wait(10)
        add_targets(collector)

    monkeypatch.setattr(RowCollector, "add_targets", held_up)
    running = client.post("/api/traces", {"prompt": DALLAS, "name": "never"})["id"]
    assert entered.wait(10)
    waiting = client.post("/api/traces", {"prompt": DALLAS, "name": "never either"})["id"]
    assert client.call("DELETE", f"/api/traces/{waiting}")[1]["state"] == "cancelled"
    client.call("DELETE", f"/api/traces/{running}")
    begin = time.perf_counter()
    released.set()
    assert list(events(client, running))[-1] == {"cancelled": True}
    assert time.perf_counter() - begin < 1.5
    assert list(events(client, waiting))[-1] == {"cancelled": True}
    monkeypatch.undo()
    assert "graph" in list(events(client, client.post("/api/traces", {"prompt": DALLAS, "name": "next"})["id"]))[-1]
    names = [graph["name"] for graph in client.get("/api/state")["graphs"]]
    assert "next.safetensors" in names and not any(name.startswith("never") for name in names)


def test_the_queue_runs_one_at_a_time_and_is_bounded() -> None:
    running, most, lock, gate = [0], [0], threading.Lock(), threading.Event()

    def trace(request: TraceRequest, report: Any) -> Any:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        gate.wait(10)
        with lock:
            running[0] -= 1
        raise ValueError("no graph\nof this")

    queue = TracingQueue(trace, lambda request, graph: "")
    request = TraceRequest.of({"prompt": "x"})
    jobs = [queue.submit(request)]
    with pytest.raises(QueueFull):
        jobs += [queue.submit(request) for _ in range(40)]
    gate.set()
    while not all(job.ended for job in queue.jobs()):
        time.sleep(0.01)
    assert most[0] == 1 and jobs[0].event == {"error": "no graph of this"}
    queue.close()
    with pytest.raises(QueueFull):
        queue.submit(request)


def test_interventions_are_as_in_the_engine(client: Client, model: pc.ReplacementModel, graph: pc.Graph) -> None:
    at_dallas = [place for place in graph.features.tolist() if place[1] == 7]
    nodes = ["/".join(map(str, place)) for place in at_dallas]
    body = {"changes": [{"nodes": nodes, "ablate": True}], "freeze": "none", "generate": 2}
    answer = client.post("/api/graphs/dallas.safetensors/intervene", body)
    changes = [pc.Intervention(*place, 0.0) for place in at_dallas]
    expected = pc.intervene(model, DALLAS, changes, freeze="none").probabilities
    for entry in answer["after"]:
        assert entry["probability"] == pytest.approx(float(expected[entry["id"]]), rel=1e-4)
    assert [entry["token"] for entry in answer["before"]] == [entry["token"] for entry in answer["after"]]
    after = model.tokenizer.decode(pc.generate(model, DALLAS, changes, max_new_tokens=2))
    assert answer["text"]["after"] == after != answer["text"]["before"]
    target = next(node for node in answer["nodes"] if node["id"] == "target/0")
    assert target["predicted"] < target["after"] < target["before"]


def test_with_everything_frozen_the_graph_foretells_every_change(client: Client, graph: pc.Graph) -> None:
    watched = ["/".join(map(str, feature)) for feature in graph.features.tolist()]
    body = {"changes": [{"node": "0/7/20", "scale": 3}], "freeze": "all", "nodes": watched}
    answer = client.post("/api/graphs/dallas.safetensors/intervene", body)
    assert answer["agreement"]["correlation"] > 0.99999 and answer["agreement"]["sign"] == 1
    assert answer["agreement"]["pairs"] == graph.rows.count - 1
    moved = [node for node in answer["nodes"] if node["foretold"]]
    assert len(moved) > 5
    for node in moved:
        assert node["change"] == pytest.approx(node["foretold"], rel=1e-3, abs=1e-4)


def test_a_contrast_changes_as_foretold(client: Client) -> None:
    request = {"prompt": DALLAS, "targets": [{"tokens": "Austin", "against": "Sacramento"}], "name": "contrast"}
    assert "graph" in list(events(client, client.post("/api/traces", request)["id"]))[-1]
    body = {"changes": [{"node": "0/7/20", "ablate": True}], "freeze": "all"}
    (target,) = client.post("/api/graphs/contrast.safetensors/intervene", body)["nodes"]
    assert target["change"] == pytest.approx(target["foretold"], rel=1e-3)
    assert target["after"] == pytest.approx(target["before"] + target["change"], rel=1e-3)


def test_pinned_nodes_are_in_the_answer(client: Client) -> None:
    address = "/api/graphs/dallas.safetensors/edits"
    state = client.get(address)
    document = {"pins": ["1/8/407"], "groups": [{"name": "Texas", "nodes": ["2/8/994"], "collapsed": True}]}
    client.post(address, {"revision": state["revision"], "document": document}, "PUT")
    body = {"changes": [{"node": "0/7/20", "value": 0.0, "everywhere": True}]}
    nodes = [node["id"] for node in client.post("/api/graphs/dallas.safetensors/intervene", body)["nodes"]]
    assert nodes == ["1/8/407", "2/8/994", "target/0"]


@pytest.mark.parametrize(
    "body",
    [{}, {"changes": []}, {"changes": [{"node": "0/7/20"}]},
     {"changes": [{"node": "0/7/20", "ablate": True, "scale": 2}]},
     {"changes": [{"node": "token/3", "ablate": True}]}, {"changes": [{"node": "0/7/20", "value": 1e30}]},
     {"changes": [{"node": "0/7/20", "ablate": True}], "freeze": "most"},
     {"changes": [{"node": "0/7/20", "ablate": True}], "generate": 10**6},
     {"changes": [{"node": "0/7/20", "scale": 2}, {"node": "0/7/20", "scale": 3}]},
     {"changes": [{"node": "0/7/20", "scale": 2}, {"node": "0/7/20", "scale": 2, "everywhere": True}]}],
)  # fmt: skip
def test_changes_that_cannot_be_are_refused(client: Client, body: dict[str, Any]) -> None:
    status, content = client.call("POST", "/api/graphs/dallas.safetensors/intervene", body)
    assert status == 400 and "must" in content["error"]
    assert (
        client.call(
            "POST", "/api/graphs/dallas.safetensors/intervene", {"changes": [{"node": "0/7/1", "ablate": True}]}
        )[0]
        == 404
    )


def test_foretold_changes_are_sums_over_paths() -> None:
    from graphs import by_hand

    graph = by_hand()  # target = 3 f1 + 1 f0 - 1 e1; f1 = 2 f0 + 2 e0; activations 1 and 2
    rows = {int(node): r for r, node in enumerate(graph.row_node)}
    direct = foretold_changes(graph, {0: 0.0}, follow_features=False)
    assert direct[rows[5]] == -1 and direct[rows[1]] == -2
    total = foretold_changes(graph, {0: 0.0}, follow_features=True)
    assert total[rows[1]] == -2 and total[rows[5]] == -1 - 3  # f1 falls by all of its 2, and its edge is 3
    both = foretold_changes(graph, {0: 0.0, 1: 4.0}, follow_features=True)
    assert both[rows[5]] == -1 + 3  # a changed feature keeps the value that it was given
    assert agreement(np.array([1.0, 2, -3]), np.array([1.0, 2, 3])) == {
        "correlation": pytest.approx(np.corrcoef([1, 2, -3], [1, 2, 3])[0, 1]), "sign": pytest.approx(2 / 3)
    }  # fmt: skip


def test_a_card_shows_the_feature_here_and_in_texts(client: Client, graph: pc.Graph) -> None:
    card = client.get("/api/features/0/20?graph=dallas.safetensors")
    assert card["label"] == "Texas" and not card["automatic"]
    node = graph.feature_node(0, 7, 20)
    assert card["here"] == [{"position": 7, "value": pytest.approx(float(graph.values[node]), rel=1e-5)}]
    top = card["examples"][0]
    assert top["values"][top["peak"]] == max(top["values"]) > 0 and len(top["tokens"]) == len(top["values"])
    assert len(card["histogram"]["edges"]) == len(card["histogram"]["counts"]) + 1
    assert 0 < card["density"] < 0.05 and len(card["raised"]) == len(card["lowered"]) == 10
    assert client.call("GET", "/api/features/0/1024")[0] == client.call("GET", "/api/features/3/0")[0] == 404


def test_a_card_reads_the_files_of_write_examples(model: pc.ReplacementModel, graph: pc.Graph, tmp_path: Path) -> None:
    graph.save(tmp_path / "dallas.safetensors")
    written = pc.write_examples(model, [DALLAS] * 2, tmp_path, features=[(0, 20)], progress=False)
    content = json.loads(next(written.iterdir()).read_text())
    with serving(tmp_path) as client:  # a folder, without the model
        card = client.get("/api/features/0/20?graph=dallas.safetensors")
        assert card["density"] == content["activation_frequency"] and card["label"] == "Texas"
        assert [entry["token"] for entry in card["raised"]] == content["top_logits"]
        assert card["examples"][0]["tokens"] == content["examples_quantiles"][0]["examples"][0]["tokens"]
        nodes = client.get("/api/graphs/dallas.safetensors?node_threshold=1")["nodes"]
        densities = {node["id"]: node["density"] for node in nodes}
        assert densities["0/7/20"] == content["activation_frequency"] and densities["2/8/290"] is None
        next(written.iterdir()).write_text('{"index": 20, "examples_quantiles": 7, "histogram": {"a": 1}}')
        assert client.get("/api/features/0/20")["examples"] == []
        status, error = client.call("POST", "/api/traces", {"prompt": DALLAS})
        assert status == 400 and "a model must be served" in error["error"]


def test_the_command_serves_and_says_where(
    model: pc.ReplacementModel, graph: pc.Graph, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph.save(tmp_path / "dallas.safetensors")
    answers = []

    def wait(page: pc.PageServer) -> None:
        answers.append(Client(page).get("/api/state"))
        page.stop()

    monkeypatch.setattr(pc.PageServer, "wait", wait)
    monkeypatch.setattr(pc, "load", lambda *_, **__: model)
    code, out, err = run("serve", str(tmp_path), "--port", "0")
    assert code == 0 and "http://127.0.0.1:" in out, err
    code, out, err = run("serve", "demo", "--folder", str(tmp_path / "new"), "--port", "0")
    assert code == 0, err
    assert [graph["name"] for graph in answers[0]["graphs"]] == ["dallas.safetensors"] and answers[0]["model"] is None
    assert answers[1]["model"]["name"] == "demo" and answers[1]["graphs"] == [] and (tmp_path / "new").is_dir()
    code, _, err = run("serve", str(tmp_path), "--host", "0.0.0.0")
    assert code == 2 and "serve: token must be given" in err
    code, _, err = run("serve", str(tmp_path), "--variant", "x")
    assert code == 2 and "--variant must go with a model" in err


def test_a_stop_ends_a_running_trace_and_its_stream(
    model: pc.ReplacementModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pycircuit.trace.collect import RowCollector

    entered, released = threading.Event(), threading.Event()
    add_targets = RowCollector.add_targets

    def held_up(collector: RowCollector) -> None:
        entered.set()
        released.wait(10)
        add_targets(collector)

    monkeypatch.setattr(RowCollector, "add_targets", held_up)
    page = pc.serve(model, folder=tmp_path, port=0)
    client = Client(page)
    trace = client.post("/api/traces", {"prompt": DALLAS})["id"]
    assert entered.wait(10)
    with closing(events(client, trace)) as stream:  # type: ignore[type-var]
        next(stream)
        timer = threading.Timer(0.2, released.set)
        timer.start()
        begin = time.perf_counter()
        page.stop()
    timer.join()
    assert time.perf_counter() - begin < 4 and not list(tmp_path.glob("*.safetensors"))


def test_a_card_of_another_models_graph_says_nothing_of_this_models_feature(
    model: pc.ReplacementModel, graph: pc.Graph, tmp_path: Path
) -> None:
    from dataclasses import replace

    other = replace(graph, provenance={**graph.provenance, "model": "another"}, labels={}, automatic_labels={})
    other.save(tmp_path / "other.safetensors")
    with serving(model, folder=tmp_path) as client:
        assert client.get("/api/features/0/20")["raised"]
        card = client.get("/api/features/0/20?graph=other.safetensors")
        assert card["raised"] == card["examples"] == [] and card["label"] == "" and card["here"]


def test_a_graph_of_another_model_is_not_changed(model: pc.ReplacementModel, graph: pc.Graph, tmp_path: Path) -> None:
    from dataclasses import replace

    replace(graph, values=graph.values * torch.linspace(1, 2, len(graph.values))).save(tmp_path / "other.safetensors")
    with serving(model, folder=tmp_path) as client:
        body = {"changes": [{"node": "0/7/20", "ablate": True}]}
        status, content = client.call("POST", "/api/graphs/other.safetensors/intervene", body)
        assert status == 400 and "graph must be of the served model" in content["error"]
        assert client.raw("DELETE", "/api/traces/none", headers=EDITS)[0] == 404
