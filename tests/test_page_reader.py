"""Tests of reading the JSON of graph pages: our own, other tools', and what is no graph."""

from __future__ import annotations

import copy
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import by_hand, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from pycircuit.graph import Graph, GraphFileError, Targets
from pycircuit.graph.io import page_reader
from pycircuit.graph.io.page_json import feature_id
from pycircuit.graph.io.page_metadata import FLAVOURS


def saved(content: Any, path: Path) -> Path:
    path.write_text(json.dumps(content))
    return path


def read(content: Any, folder: Path) -> Graph:
    return Graph.from_json(saved(content, folder / "g.json"))


def node(kind: str, node_id: str, layer: Any, position: int, feature: Any, **fields: Any) -> dict[str, Any]:
    """The fields that the schema requires of a node, and others."""
    required = {"node_id": node_id, "feature": feature, "layer": layer, "ctx_idx": position, "feature_type": kind}
    return required | {"jsNodeId": "", "clerp": ""} | fields


def foreign() -> dict[str, Any]:
    """A file with no more than what the schema requires, as another tool may write it."""
    return {
        "metadata": {"slug": "s", "scan": "gemma-2-2b", "prompt_tokens": ["<bos>", "1", "2"], "prompt": "<bos>12"},
        "qParams": {},
        "nodes": [
            node("cross layer transcoder", "0_18753_2", "0", 2, 175865634),
            node("transcoder", "13_82873_2", 13, 2, feature_id(13, 82873), jsNodeId="13_82873-0", activation=2.5),
            node("mlp reconstruction error", "24_-1_2", "24", 2, None),
            node("embedding", "E_2_0", "E", 0, 0),
            node("embedding", "E_235274_2", "E", 2, 2, influence=None),
            node("logit", "27_235310_2", "27", 2, 235310, clerp='Output "4" (p=0.233)'),
            node("logit", "27_235318_2", "27", 2, 235318, clerp='Output "a "b"" (p=0.142)', token_prob=0.1416),
        ],
        "links": [
            {"source": "E_2_0", "target": "0_18753_2", "weight": -2.390625},
            {"source": "0_18753_2", "target": "13_82873_2", "weight": 1},
            {"source": "13_82873_2", "target": "27_235310_2", "weight": 1.5},
            {"source": "24_-1_2", "target": "27_235310_2", "weight": 0.25},
        ],
    }


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("seed", range(3))
def test_our_own_files_come_back(tmp_path: Path, flavour: Any, seed: int) -> None:
    graph = random_graph(count=60, seed=seed)
    labels = {(layer, feature): f"F{layer} (p=1)" for layer, _, feature in graph.features[::3].tolist()}
    odd = Targets([" a(p=3)", 'b "c" − d'], torch.tensor([5, -1]), graph.targets.weights, graph.targets.positions)
    automatic = {(layer, feature): "raises x" for layer, _, feature in graph.features[1::3].tolist()}
    graph = replace(graph, labels=labels, automatic_labels=automatic, targets=odd)
    graph.to_json(tmp_path / "g.json", slug="mine", flavour=flavour)
    got, pruned = Graph.from_json(tmp_path / "g.json"), graph.prune().graph
    remaining = [tuple(f) for f in pruned.features.tolist()]
    order = [remaining.index(tuple(f)) for f in got.features.tolist()] + list(range(len(remaining), pruned.nodes))
    assert sorted(order) == list(range(pruned.nodes))
    assert torch.equal(got.dense(), pruned.dense()[order][:, order])
    assert torch.equal(got.values, pruned.values[order[: len(remaining)]].double())
    assert got.targets.labels == [" a(p =3)", 'b "c" − d'] and got.targets.ids.tolist() == [5, -1]
    assert torch.equal(got.targets.weights, graph.targets.weights) and got.prompt == graph.prompt
    assert torch.equal(got.targets.positions, graph.targets.positions) and got.layers == graph.layers
    assert torch.equal(got.tokens.ids, graph.tokens.ids) and list(got.tokens.text) == list(graph.tokens.text)
    assert got.vocab_size == graph.vocab_size and np.isnan(got.certificate)
    assert got.scores() == pytest.approx(pruned.scores(), rel=1e-9)
    assert {key: text.replace("(p=", "(p =") for key, text in got.labels.items()} == {
        (layer, feature): labels[layer, feature].replace("(p=", "(p =")
        for layer, _, feature in remaining if (layer, feature) in labels
    }  # fmt: skip
    assert got.automatic_labels == {
        (layer, feature): "raises x" for layer, _, feature in remaining
        if (layer, feature) in automatic and (layer, feature) not in labels
    }  # fmt: skip
    assert got.provenance["page"]["slug"] == "mine"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_file_read_and_written_again_is_the_same(tmp_path: Path, flavour: Any) -> None:
    """Nodes, links, pins and groups; one flavour becomes the other, and a pruned graph is not pruned again at 1."""
    graph = random_graph(count=60, seed=5)
    graph.to_json(tmp_path / "a.json", slug="a", groups=[("mine", [0, 3])], pinned=[graph.token_node(1)])
    Graph.from_json(tmp_path / "a.json").to_json(
        tmp_path / "b.json", slug="a", node_threshold=1, edge_threshold=1, flavour=flavour, scan="m"
    )
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert first["qParams"] == second["qParams"] and len(first["qParams"]["pinnedIds"]) == 3

    def plain(entries: list[dict[str, Any]]) -> list[str]:
        return sorted(json.dumps({k: v for k, v in e.items() if k != "influence"}, sort_keys=True) for e in entries)

    assert plain(first["nodes"]) == plain(second["nodes"]) and plain(first["links"]) == plain(second["links"])


def test_a_file_with_required_fields_alone(tmp_path: Path) -> None:
    graph = read(foreign(), tmp_path)
    assert graph.features.tolist() == [[0, 2, 18753], [13, 2, 82873]] and graph.values.tolist() == [0, 2.5]
    assert graph.layers == 26  # the logits are of layer 27
    assert graph.tokens.ids.tolist() == [2, 0, 235274] and graph.provenance["unknown_tokens"] == [1]
    assert graph.targets.labels == ["4", 'a "b"'] and graph.targets.ids.tolist() == [235310, 235318]
    assert graph.targets.weights.tolist() == [0.233, 0.1416] and graph.targets.positions.tolist() == [2, 2]
    dense = graph.dense()
    assert float(dense[0, graph.token_node(0)]) == -2.390625 and float(dense[1, 0]) == 1
    assert float(dense[graph.target_node(), graph.error_node(24, 2)]) == 0.25
    assert graph.rows.count == 4 and graph.provenance["scan"] == "gemma-2-2b"
    graph.save(tmp_path / "g.safetensors")
    assert np.isnan(Graph.load(tmp_path / "g.safetensors").certificate)
    graph.prune().graph.tree()


def test_errors_named_as_before_july_2026(tmp_path: Path) -> None:
    content = change("nodes.2", node("mlp reconstruction error", "0_24_2", "24", 2, -1, jsNodeId="24_2-0"))
    content["links"][3]["source"] = "0_24_2"
    assert torch.equal(read(content, tmp_path).dense(), read(foreign(), tmp_path).dense())


def test_optional_fields(tmp_path: Path) -> None:
    content = foreign()
    del content["qParams"]
    content["metadata"] |= {"node_threshold": None, "info": None, "transcoder_list": ["org/a", "org/b"]}
    content["qk_only_nodes"] = {"x": {}}
    for logit in content["nodes"][-2:]:
        logit["clerp"] = ""
        logit.pop("token_prob", None)
    graph = read(content, tmp_path)
    assert graph.targets.labels == ["235310", "235318"] and graph.targets.weights.tolist() == [0.5, 0.5]
    assert graph.provenance["scan"] == ["org/a", "org/b"]


def test_pins_groups_and_labels_of_an_address(tmp_path: Path) -> None:
    """Pages keep lists as texts; labels by the feature's number, or with its layer and position around it."""
    number, content = feature_id(13, 82873), foreign()
    content["qParams"] = {
        "pinnedIds": "0_18753_2,E_2_0,gone_1_2", "supernodes": json.dumps([["say 4", "27_235310_2", "no"]]),
        "clerps": json.dumps([[str(number), "digits"], ["0_175865634_2", "ones"], ["x", "nothing"]]),
    }  # fmt: skip
    graph = read(content, tmp_path)
    assert graph.provenance["page"]["pinned"] == ["0/2/18753", "token/0"]
    assert graph.provenance["page"]["groups"] == [["say 4", "target/0"]]
    assert graph.labels == {(13, 82873): "digits", (0, 18753): "ones"}


@pytest.mark.parametrize(
    ("fields", "index"),
    [
        ({"node_id": "13_82873_2"}, 82873),
        ({"node_id": "n7", "jsNodeId": "13_5-0"}, 5),
        ({"node_id": "n7", "feature": feature_id(13, 99)}, 99),
        ({"node_id": "12_4_2", "feature": 77}, 77),  # an id of another layer says nothing; 77 is no pair of layer 13
    ],
)
def test_where_the_index_of_a_feature_is(tmp_path: Path, fields: dict[str, Any], index: int) -> None:
    content = foreign()
    content["nodes"] = [node("transcoder", "", 13, 2, 0) | fields, *content["nodes"][3:]]
    content["links"] = []
    assert read(content, tmp_path).features.tolist() == [[13, 2, index]]


def test_numbers_that_pair_layer_and_feature() -> None:
    for layer, feature in [(0, 0), (0, 1), (1, 0), (25, 2**24), (4000, 2**40)]:
        assert page_reader.unpaired(feature_id(layer, feature)) == (layer, feature)


def change(place: str, value: Any) -> dict[str, Any]:
    """The foreign file with one value replaced, by its path; a value of `KeyError` is taken away."""
    content = copy.deepcopy(foreign())
    *path, last = (int(key) if key.isdecimal() else key for key in place.split("."))
    owner: Any = content
    for key in path:
        owner = owner[key]
    if value is KeyError:
        del owner[last]
    else:
        owner[last] = value
    return content


MALFORMED: list[tuple[str, Any, str]] = [
    ("nodes", KeyError, "have metadata, nodes, links, got links, metadata, qParams"),
    ("metadata.prompt_tokens", KeyError, "metadata.prompt_tokens must be list, got None"),
    ("metadata.prompt_tokens", ["a", 3, "b"], r"tokens.text\[1\] must be a string"),
    ("metadata.prompt_tokens", ["a"], r"nodes\[0\].ctx_idx must be below the 1 prompt_tokens, got 2"),
    ("metadata", [], "metadata must be dict, got list"),
    ("nodes", {}, "nodes must be list, got dict"),
    ("nodes.0", 3, r"nodes\[0\] must be an object, got int"),
    ("nodes.0.node_id", KeyError, r"nodes\[0\].node_id must be str, got None"),
    ("nodes.0.node_id", "E_2_0", r"nodes\[3\].node_id must be its own, got 'E_2_0' twice \(files of circuit-tracer"),
    ("nodes.0.ctx_idx", True, r"nodes\[0\].ctx_idx must be int, got True"),
    ("nodes.0.ctx_idx", -1, r"nodes\[0\].ctx_idx must be below"),
    ("nodes.0.layer", "E", r"nodes\[0\].layer must be a number from 0, got 'E'"),
    ("nodes.0.layer", 10**9, r"nodes\[0\].layer must be a number from 0, got 1000000000"),
    ("nodes.0.layer", 99_999, r"nodes\[0\].layer must be below 4096, got 99999"),
    ("nodes.0.feature_type", "lorsa", r"feature_type must be of a transcoder, error, embedding or logit, got lorsa"),
    ("nodes.1.activation", "2", r"nodes\[1\].activation must be int or float, got '2'"),
    ("nodes.1.activation", 10**400, "int too large to convert to float"),
    ("nodes.5.token_prob", -0.5, "targets.weights must be finite and not negative"),
    ("nodes.5.layer", "99999", r"nodes\[5\].layer must be below 4096"),
    ("links.0.weight", KeyError, r"links\[0\].weight must be int or float, got None"),
    ("links.0.source", "E_9_9", r"links\[0\].source must be a node_id, got 'E_9_9'"),
    ("links.0.target", "E_235274_2", r"links\[0\] must enter a feature or logit and leave none"),
    ("links.0.source", "27_235310_2", r"links\[0\] must enter a feature or logit and leave none"),
    ("links.0", {"source": "13_82873_2", "target": "0_18753_2", "weight": 1}, "must hold edges from lower layers only"),
    ("links.1", {"source": "E_2_0", "target": "0_18753_2", "weight": 1}, "links must name a pair of nodes once"),
    ("qParams", {"supernodes": [3]}, r"qParams.supernodes\[0\] must be a name and node ids, got 3"),
    ("qParams", {"clerps": "{}"}, "qParams.clerps must be a list, got dict"),
    ("metadata.generation_settings", {"layers": 10**9}, "generation_settings.layer must be below 4096"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "message"), MALFORMED)
def test_malformed_files(tmp_path: Path, place: str, value: Any, message: str) -> None:
    with pytest.raises(GraphFileError, match=r"Graph\.from_json: .*g\.json must .*" + message):
        read(change(place, value), tmp_path)


HOSTILE = {
    "empty": b"", "text": b"hello", "binary": bytes(range(256)), "list": b"[]", "number": b"3", "object": b"{}",
    "nan": json.dumps(foreign()).replace("1.5", "NaN").encode(), "infinity": b'{"metadata": Infinity}',
    "nested": b"[" * 200_000, "nested_objects": b'{"metadata":' * 100_000, "digits": b"1" * 1_000_000,
    "lists": b"[" + b"[]," * 4_200_000 + b"[]]",
    "cut": json.dumps(foreign()).encode()[:-3], "twice": json.dumps(foreign()).encode() * 2, "utf16": b"\xff\xfe[\x00",
    "feature": json.dumps(change("nodes.0", node("t", "x", 0, 2, 10**4000))).encode(),
    "many_errors": json.dumps(
        change("metadata.prompt_tokens", ["a"] * 50_000) | {"nodes": [node("t", "4000_1_0", 4000, 0, 0)], "links": []}
    ).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "h.json"
    path.write_bytes(HOSTILE[name])
    begin = time.perf_counter()
    with pytest.raises(GraphFileError, match=r"h\.json must") as refusal:
        Graph.from_json(path)
    assert len(str(refusal.value)) < 1000 and time.perf_counter() - begin < 5


def test_files_too_large_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(page_reader.MAX_BYTES + 1)
    with pytest.raises(GraphFileError, match=r"large\.json must have at most 128 MB, got 128"):
        Graph.from_json(tmp_path / "large.json")
    with pytest.raises(FileNotFoundError, match=r"Graph\.from_json: path must be a file, got .*absent\.json"):
        Graph.from_json(tmp_path / "absent.json")


VALUES: list[Any] = [None, True, -1, 0, 1.5, 2**63, 1e308, "", "x", "0_1_0", [], [1], {}, {"a": 1}, "E", [["a"]]]


def mutated(rng: random.Random, content: Any) -> Any:
    """A value replaced, taken away or doubled, at any depth."""
    content = copy.deepcopy(content)
    owner = content
    while True:
        key = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        if isinstance(owner[key], dict | list) and owner[key] and rng.random() < 0.85:
            owner = owner[key]
            continue
        if rng.random() < 0.2 and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[key]))
        elif rng.random() < 0.2:
            del owner[key]
        else:
            owner[key] = rng.choice(VALUES)
        return content


def test_whatever_reads_is_a_graph(tmp_path: Path) -> None:
    """Damaged files: an error that names the file, or a graph that everything works on."""
    path, rng, outcomes = tmp_path / "d.json", random.Random(0), [0, 0]
    random_graph(count=10, layers=2, positions=2).to_json(path, node_threshold=1, edge_threshold=1)
    own = json.loads(path.read_text())
    for i in range(200):
        content = own if i % 2 else foreign()
        for _ in range(rng.randint(1, 3)):
            content = mutated(rng, content)
        saved(content, path)
        try:
            graph = Graph.from_json(path)
        except GraphFileError as error:
            assert "d.json" in str(error) and len(str(error)) < 1000
            outcomes[0] += 1
            continue
        outcomes[1] += 1
        with np.errstate(all="ignore"):  # weights of 1e308 overflow
            graph.prune().graph.to_scipy()
            graph.to_json(tmp_path / "again.json", scan="s", slug="again", flavour="neuronpedia")
    assert min(outcomes) > 20


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
NAMES = st.sampled_from(["metadata", "nodes", "links", "qParams", "x"])


@settings(max_examples=30)
@given(st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner)))
def test_any_json(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    saved(content, path)
    with pytest.raises(GraphFileError, match=r"any\.json must"):
        Graph.from_json(path)


def test_open_reads_by_the_ending(tmp_path: Path) -> None:
    graph = by_hand()
    graph.save(tmp_path / "g.safetensors")
    graph.to_json(tmp_path / "g.JSON", node_threshold=1, edge_threshold=1)
    graph.to_circuit_tracer(tmp_path / "g.pt")
    opened = [Graph.open(tmp_path / name) for name in ("g.safetensors", "g.JSON", "g.pt")]
    assert all(torch.equal(other.dense(), graph.dense()) for other in opened)
    assert opened[0].certificate == 0 and all(np.isnan(other.certificate) for other in opened[1:])

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return f"<{ids[0]}>"

    assert list(Graph.open(tmp_path / "g.pt", Tokenizer()).tokens.text) == ["<7>"]
    for name in ("g", "g.svg", "graph-metadata"):
        with pytest.raises(
            ValueError, match=rf"Graph\.open: path must end in \.safetensors, \.json, \.pt, got .*{name}"
        ):
            Graph.open(tmp_path / name)
