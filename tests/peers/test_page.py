"""Our JSON where circuit-tracer's goes: in its schema, on its server in a process of its own, beside its own file."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pair
import pytest
import torch
from circuit_tracer.frontend import feature_models, graph_models
from circuit_tracer.utils import create_graph_files as circuit_tracer_files
from circuit_tracer.utils.decode_url_features import decode_url_features
from graphs import random_graph

import pycircuit as pc

SIZE = pair.Size()
MODEL = ("llama", pair.Kind(), SIZE, torch.float32, 6)
NODE, EDGE = 0.97, 0.99  # of a graph this small the usual thresholds leave no feature
MODULES = Path(".venv-peers/browser/node_modules")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SERVE = """
import sys, threading
from circuit_tracer.frontend.local_server import serve
serve(sys.argv[1], port=int(sys.argv[2]))
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def graphs() -> tuple[pc.Graph, Any]:
    """Ours and circuit-tracer's of the same features."""
    ids = pair.prompt(13, SIZE.vocabulary)
    ours = pair.trace_ours(pair.our_model(*MODEL), ids, max_features=60, round_size=64)
    theirs = pair.trace_circuit_tracer(pair.circuit_tracer_model(*MODEL), ids, batch_size=16, max_feature_nodes=60)
    return pair.selected(ours), theirs


@pytest.fixture(scope="module")
def folder(graphs: tuple[pc.Graph, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs")
    graphs[0].to_json(path / "tiny.json", slug="tiny", scan="tiny-scan", node_threshold=NODE, edge_threshold=EDGE)
    return path


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """circuit-tracer's server, started on our folder as its users start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(folder), str(port)])
    try:
        for _ in range(600):
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def fetch(url: str) -> tuple[int, bytes]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.status, answer.read()


def counts(graph: pc.Graph) -> tuple[int, int]:
    pruned = graph.prune(NODE, EDGE)
    assert pruned.node_mask[: graph.first_error].any()
    return int(pruned.node_mask.sum()), int(pruned.edge_mask.sum())


def test_their_server_hands_out_our_graph(graphs: tuple[pc.Graph, Any], address: str) -> None:
    status, body = fetch(f"{address}/graph_data/tiny.json")
    full = json.loads(body)
    assert status == 200 and (len(full["nodes"]), len(full["links"])) == counts(graphs[0])
    assert len(full["links"]) > 100
    status, body = fetch(f"{address}/data/graph-metadata.json")
    assert status == 200 and [entry["slug"] for entry in json.loads(body)["graphs"]] == ["tiny"]
    status, body = fetch(f"{address}/index.html")
    assert status == 200 and b"graph-metadata.json" in body


def opened(url: str) -> dict[str, Any]:
    """Contents of the page in a real browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None or not MODULES.is_dir():
        pytest.skip("needs npm, and chromium or Chrome")
    script = Path(__file__).with_name("browser") / "open.mjs"
    done = subprocess.run(["node", str(script), url, str(MODULES), browser], stdout=subprocess.PIPE, timeout=120)
    assert done.returncode == 0
    return json.loads(done.stdout)


def test_their_page_draws_our_graph(folder: Path, address: str) -> None:
    """The page leaves out nodes beyond the threshold, as of circuit-tracer's own files."""
    drawn, full = opened(f"{address}/index.html?slug=tiny"), json.loads((folder / "tiny.json").read_text())
    within = {n["node_id"] for n in full["nodes"] if n["influence"] is None or n["influence"] <= NODE}
    within |= {n["node_id"] for n in full["nodes"] if n["feature_type"] == "embedding"}
    assert drawn["errors"] == [] and set(drawn["nodes"]) == within and len(drawn["nodes"]) == len(within)
    assert drawn["links"] == sum({e["source"], e["target"]} <= within for e in full["links"]) > 100


def shown(folder: Path, address: str, graph: pc.Graph, scan: str, texts: list[list[int]], rank: int) -> Any:
    """(our file of a feature of the graph, what the page shows of it); rank: among those active least to most often."""
    made = pc.write_examples(
        pair.our_model(*MODEL), texts, folder, scan, top=3, groups=2, per_group=2, logits=4, progress=False
    )
    graph.to_json(folder / f"{scan}.json", scan=f"./data/features/{scan}", node_threshold=1, edge_threshold=1)
    nodes = json.loads((folder / f"{scan}.json").read_text())["nodes"]
    files = {n["node_id"]: json.loads((made / f"{n['feature']}.json").read_text()) for n in nodes if n["activation"]}
    node = sorted(files, key=lambda node: files[node]["activation_frequency"])[rank]
    drawn = opened(f"{address}/index.html?slug={scan}&clickedId={node}")
    assert drawn["errors"] == []
    assert f"/{node.split('_')[1]} Act:" in " ".join(drawn["feature"].split())
    assert drawn["tokens"] == [files[node]["top_logits"], files[node]["bottom_logits"]]
    return files[node], drawn["groups"]


def test_their_page_shows_our_examples(graphs: tuple[pc.Graph, Any], folder: Path, address: str) -> None:
    texts = [pair.prompt(length, SIZE.vocabulary).tolist() for length in (5, 13, 9, 13, 21)]
    result, groups = shown(folder, address, graphs[0], "often", texts, -1)
    assert [group["name"] for group in groups] == ["Top activations", "Quantile 50% to 100%", "Quantile 0% to 50%"]
    assert len(result["examples_quantiles"]) == len(groups)
    for group, expected in zip(groups, result["examples_quantiles"], strict=True):
        assert group["name"] == expected["quantile_name"]
        for drawn, example in zip(group["examples"], expected["examples"], strict=True):
            assert drawn["text"] == "".join(example["tokens"])
            assert example["tokens"][example["train_token_ind"]] in drawn["token"]
            assert drawn["faint"] == example["is_repeated_datapoint"]


def test_their_page_shows_a_silent_feature(graphs: tuple[pc.Graph, Any], folder: Path, address: str) -> None:
    result, groups = shown(folder, address, graphs[0], "silent", [[3, 4, 5]], 0)
    assert result["activation_frequency"] == 0 and groups == []


def test_their_schema_takes_our_examples(folder: Path) -> None:
    files = list((folder / "features" / "often").iterdir())
    assert len(files) == SIZE.layers * SIZE.features
    for path in files:
        full = json.loads(path.read_text())
        read = feature_models.Model.model_validate(full, strict=True).model_dump()
        assert read == {name: value for name, value in full.items() if name != "label"}


def test_their_page_can_save_into_our_file(folder: Path, address: str) -> None:
    full = json.loads((folder / "tiny.json").read_text())
    pinned = [full["nodes"][0]["node_id"]]
    body = json.dumps({"qParams": {**full["qParams"], "pinnedIds": pinned}}).encode()
    with urllib.request.urlopen(f"{address}/save_graph/tiny", data=body, timeout=30) as answer:
        assert answer.status == 200
    saved = json.loads((folder / "tiny.json").read_text())
    assert saved["qParams"]["pinnedIds"] == pinned and saved["links"] == full["links"]


def test_their_parser_of_addresses_takes_our_supernodes(tmp_path: Path) -> None:
    """Names with signs that addresses use come through, and so do ids of errors."""
    graph = random_graph(count=60)
    labels = {(layer, feature): "50% & #1" for layer, _, feature in graph.features[::2].tolist()}
    query = replace(graph, labels=labels).to_json(tmp_path / "g.json", node_threshold=1, edge_threshold=1)
    content = json.loads((tmp_path / "g.json").read_text())
    groups, single = decode_url_features(f"http://127.0.0.1/index.html?{query}")
    assert [[name, *(f"{f.layer}_{f.feature_idx}_{f.pos}" for f in members)] for name, members in groups.items()] == (
        content["qParams"]["supernodes"]
    )
    assert len(single) == len(content["qParams"]["pinnedIds"]) > 0
    errors = [n["node_id"] for n in content["nodes"] if "error" in n["feature_type"]]
    _, pinned = decode_url_features(f"http://127.0.0.1/index.html?slug=g&pinnedIds={','.join(errors)}")
    assert len(pinned) == len(errors) > 0 and {feature.feature_idx for feature in pinned} == {-1}


def test_their_schema_takes_our_file_and_loses_nothing(folder: Path) -> None:
    full = json.loads((folder / "tiny.json").read_text())
    read = graph_models.Model.model_validate(full, strict=True).model_dump()
    assert read["nodes"] == full["nodes"] and read["qParams"] == full["qParams"]
    links = [graph_models.Link.model_validate(link, strict=True).model_dump() for link in full["links"]]
    assert links == full["links"] == read["links"]
    assert read["metadata"].items() <= full["metadata"].items()


def _their_file(theirs: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    class Local:
        @staticmethod
        def from_pretrained(_: Any) -> pair.Tokenizer:
            return pair.Tokenizer(SIZE.vocabulary)

    module = sys.modules[circuit_tracer_files.__module__]
    monkeypatch.setattr(module, "AutoTokenizer", Local)
    circuit_tracer_files(theirs, "tiny", str(path), scan="tiny-scan", node_threshold=NODE, edge_threshold=EDGE)
    return json.loads((path / "tiny.json").read_text())


def test_we_read_their_file_and_their_page_draws_it_again(
    graphs: tuple[pc.Graph, Any], folder: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = _their_file(graphs[1], tmp_path, monkeypatch)
    ids = [n["node_id"] for n in theirs["nodes"]]
    assert len(set(ids)) == len(ids), "their file names an error like a feature: take another seed"
    read, pruned = pc.Graph.from_json(tmp_path / "tiny.json"), graphs[0].prune(NODE, EDGE).graph
    order = [read.features.tolist().index(f) for f in pruned.features.tolist()]
    order += range(len(order), read.nodes)
    dense = read.dense()[order][:, order].float()
    assert read.layers == SIZE.layers and len(read.features) == len(pruned.features)
    assert torch.allclose(dense, pruned.dense().float(), rtol=1e-4, atol=1e-5 * float(dense.abs().max()))
    read.to_json(folder / "again.json", scan="tiny-scan", node_threshold=1, edge_threshold=1)
    full, drawn = json.loads((folder / "again.json").read_text()), opened(f"{address}/index.html?slug=again")
    assert drawn["errors"] == [] and len(drawn["nodes"]) == len(full["nodes"]) == len(theirs["nodes"])
    assert drawn["links"] == len(full["links"]) == len(theirs["links"])


def _ours(node_id: str, feature_type: str) -> str:
    """Error ids of circuit-tracer before July 2026, 0_{layer}_{position}, are those of layer 0's features."""
    if feature_type != "mlp reconstruction error" or "_-1_" in node_id:
        return node_id
    _, layer, position = node_id.split("_")
    return f"{layer}_-1_{position}"


def test_the_same_file_as_theirs(
    graphs: tuple[pc.Graph, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = json.loads((folder / "tiny.json").read_text()), _their_file(graphs[1], tmp_path, monkeypatch)
    nodes = [{n["node_id"]: n for n in full["nodes"]} for full in (mine, theirs)]
    nodes[1] = {_ours(key, n["feature_type"]): n for key, n in nodes[1].items()}
    assert nodes[0].keys() == nodes[1].keys()
    for key, node in nodes[0].items():
        other = nodes[1][key]
        assert node.keys() == other.keys()
        same = node.keys() - {"node_id", "jsNodeId", "activation", "influence", "token_prob", "clerp"}
        assert {name: node[name] for name in same} == {name: other[name] for name in same}
        for name in ("activation", "influence", "token_prob"):
            assert node[name] == (None if other[name] is None else pytest.approx(other[name], rel=1e-4)), (key, name)
    kinds = {n["node_id"]: n["feature_type"] for n in theirs["nodes"]}
    ends = {
        (_ours(e["source"], kinds[e["source"]]), _ours(e["target"], kinds[e["target"]])): e["weight"]
        for e in theirs["links"]
    }
    assert {(e["source"], e["target"]) for e in mine["links"]} == ends.keys()
    largest = max(abs(w) for w in ends.values())
    for edge in mine["links"]:
        assert edge["weight"] == pytest.approx(ends[edge["source"], edge["target"]], rel=1e-4, abs=1e-5 * largest)
