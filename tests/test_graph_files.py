"""Graphs on disk: safetensors, the page's JSON, other libraries."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, unquote

import numpy as np
import pytest
import torch
from graphs import by_hand, cone_graph, random_graph
from safetensors.torch import load_file, safe_open, save_file

from pycircuit.graph import Graph, GraphFileError, Rows, Targets


def same(a: Graph, b: Graph) -> bool:
    tensors = ("features", "values", "row_node", "bias", "preactivation", "dropped", "dropped_mass", "product_norm")
    plain = ("layers", "prompt", "vocab_size", "timings", "provenance")
    return (
        all(torch.equal(getattr(a, n), getattr(b, n)) and getattr(a, n).dtype == getattr(b, n).dtype for n in tensors)
        and all(getattr(a, n) == getattr(b, n) for n in plain)
        and all(torch.equal(getattr(a.rows, n), getattr(b.rows, n)) for n in ("row_ptr", "column", "weight"))
        and all(torch.equal(getattr(a.targets, n), getattr(b.targets, n)) for n in ("ids", "weights", "positions"))
        and (a.targets.labels, a.tokens.text) == (b.targets.labels, b.tokens.text)
        and torch.equal(a.tokens.ids, b.tokens.ids)
    )


def rewrite(path: Path, into: Path, metadata: dict[str, str] | None = None, **changes: Any) -> Path:
    """A copy of a saved graph with tensors replaced (None: taken away)."""
    with safe_open(path, "pt") as file:
        given = file.metadata() if metadata is None else metadata
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, into, given)
    return into


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    random_graph(count=8, layers=2, positions=2).save(tmp_path / "g.safetensors")
    return tmp_path / "g.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    odd = random_graph(dtype=dtype)
    odd = replace(odd, prompt='a "b"\n\ud800 \u2603', provenance={"deep": {"list": [1, None, 2.5]}})
    for i, graph in enumerate((odd, by_hand(), odd.prune().graph, random_graph(count=0))):
        path = tmp_path / f"{i}.safetensors"
        graph.save(path)
        assert same(Graph.load(path), graph)
        graph.save(str(path))
        first = path.read_bytes()
        Graph.load(path).save(path)
        assert path.read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i}.safetensors" for i in range(4)]


def test_saved_graphs_are_not_pickles(saved: Path) -> None:
    header = int.from_bytes(saved.read_bytes()[:8], "little")
    assert "__metadata__" in json.loads(saved.read_bytes()[8 : 8 + header])


def test_loaded_graph_outlives_its_file(saved: Path) -> None:
    graph = Graph.load(saved)
    before = graph.dense()
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert torch.equal(graph.dense(), before)


def test_every_truncation_is_refused(saved: Path, tmp_path: Path) -> None:
    whole, cut = saved.read_bytes(), tmp_path / "cut.safetensors"
    lengths = {*range(0, len(whole), 37), *range(12), len(whole) - 1}
    for length in sorted(lengths):
        cut.write_bytes(whole[:length])
        with pytest.raises(GraphFileError, match=r"cut\.safetensors must be a whole safetensors file"):
            Graph.load(cut)
    cut.write_bytes(whole + b"x")
    with pytest.raises(GraphFileError, match=r"cut\.safetensors"):
        Graph.load(cut)


def test_damaged_bytes_never_give_another_error(saved: Path, tmp_path: Path) -> None:
    whole, bad = saved.read_bytes(), tmp_path / "bad.safetensors"
    refused = 0
    for at in range(0, len(whole), 23):
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            Graph.load(bad)
        except GraphFileError as error:
            assert "bad.safetensors" in str(error)
            refused += 1
    assert refused > 20


def test_whatever_loads_is_a_graph(saved: Path, tmp_path: Path) -> None:
    """Runs of damaged bytes: an error that names the file, or a graph that everything works on."""
    whole, bad, rng = saved.read_bytes(), tmp_path / "bad.safetensors", np.random.default_rng(0)
    loaded = 0
    for _ in range(300):
        damaged, at = bytearray(whole), int(rng.integers(len(whole)))
        for i in range(at, min(len(whole), at + int(rng.integers(1, 9)))):
            damaged[i] = rng.integers(256)
        bad.write_bytes(damaged)
        try:
            graph = Graph.load(bad)
        except GraphFileError as error:
            assert "bad.safetensors" in str(error)
            continue
        loaded += 1
        with np.errstate(all="ignore"):  # weights of 1e300 overflow
            graph.prune().graph.to_scipy()
            assert graph.paths(graph.token_node(0), graph.target_node(0)) is not None
    assert 20 < loaded < 280


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 5000])
def test_garbage(tmp_path: Path, size: int) -> None:
    path, rng = tmp_path / "g.safetensors", np.random.default_rng(size)
    for begin in (b"", b"\xff" * 8, (2**62).to_bytes(8, "little"), (50).to_bytes(8, "little") + b"{", b"PK\3\4"):
        path.write_bytes((begin + rng.bytes(size))[:size])
        with pytest.raises(GraphFileError, match=r"g\.safetensors must be a whole safetensors file"):
            Graph.load(path)


@pytest.mark.parametrize("write", ["save", "to_json"])
def test_places_that_cannot_be_written(tmp_path: Path, write: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"Graph.{write}: path must be in a folder that exists, got .*absent"):
        getattr(by_hand(), write)(tmp_path / "absent" / "g")
    with pytest.raises(IsADirectoryError, match=rf"Graph.{write}: path must be a file, got the folder"):
        getattr(by_hand(), write)(tmp_path)


def test_saved_graph_of_tensors_that_share_memory(tmp_path: Path) -> None:
    """Columns of one tensor, one tensor twice, a part of a longer one: all that safetensors refuses or would widen."""
    graph = by_hand()
    both = torch.stack([graph.bias, graph.preactivation], 1)
    long = torch.cat([graph.rows.weight, torch.ones(1000, dtype=torch.float64)])
    rows = Rows.trusted(graph.rows.row_ptr, graph.rows.column, long[: graph.rows.entries])
    shared = torch.zeros(3, dtype=torch.float64)
    odd = replace(graph, rows=rows, bias=both[:, 0], preactivation=both[:, 1], dropped=shared, dropped_mass=shared)
    odd.save(tmp_path / "g.safetensors")
    assert same(Graph.load(tmp_path / "g.safetensors"), graph)
    assert (tmp_path / "g.safetensors").stat().st_size < 4000


def test_foreign_files(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    torch.save({"a": torch.ones(3)}, other)
    with pytest.raises(GraphFileError, match="whole safetensors file"):
        Graph.load(other)
    save_file({"a": torch.ones(3)}, other)
    with pytest.raises(GraphFileError, match="saved by pycircuit, got another safetensors file"):
        Graph.load(other)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        Graph.load(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="must be a file"):
        Graph.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 1, got 2"),
        ({"version": None}, "version 1, got None"),
        ({"layers": "two"}, "layers must be a int, got str"),
        ({"layers": -1}, "layers must be zero or positive"),
        ({"prompt": 3}, "prompt must be a str, got int"),
        ({"token_text": ["a"]}, "tokens.ids must have shape"),
        ({"token_text": [1, 2]}, r"tokens.text\[0\] must be a string"),
        ({"timings": []}, "timings must be a dict, got list"),
    ],
)
def test_wrong_metadata(saved: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with safe_open(saved, "pt") as file:
        about = json.loads(file.metadata()["pycircuit.graph"])
    path = rewrite(saved, tmp_path / "w.safetensors", {"pycircuit.graph": json.dumps({**about, **change})})
    with pytest.raises(GraphFileError, match=r"w\.safetensors.*" + message):
        Graph.load(path)


@pytest.mark.parametrize("text", ["{", "[]", "1", "[" * 100_000])
def test_metadata_that_is_no_object(saved: Path, tmp_path: Path, text: str) -> None:
    path = rewrite(saved, tmp_path / "w.safetensors", {"pycircuit.graph": text})
    with pytest.raises(GraphFileError, match=r"w\.safetensors"):
        Graph.load(path)


@pytest.mark.parametrize("name", ["values", "weight", "bias", "preactivation", "dropped", "target_weights"])
def test_nan_in_a_file(saved: Path, tmp_path: Path, name: str) -> None:
    tensor = load_file(saved)[name]
    tensor[0] = torch.nan
    path = rewrite(saved, tmp_path / "w.safetensors", **{name: tensor})
    shown = {"weight": "rows.weight", "target_weights": "targets.weights"}.get(name, name)
    with pytest.raises(GraphFileError, match=rf"w\.safetensors.*{shown} must be finite, got nan"):
        Graph.load(path)


TENSORS = [
    "features", "values", "row_ptr", "column", "weight", "row_node", "bias", "preactivation", "dropped",
    "dropped_mass", "target_ids", "target_weights", "target_positions", "token_ids",
]  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_in_a_file(saved: Path, tmp_path: Path, name: str) -> None:
    into, tensor = tmp_path / "w.safetensors", load_file(saved)[name]
    for change, message in (
        (None, rf"missing=\['{name}'\]"),
        (tensor.to(torch.float16), rf"{name} must be torch.*got torch.float16"),
        (tensor[:-1].clone(), r"Graph: .* must"),
        (tensor[None].clone(), r"Graph: .* must have ([12] dimensions|shape)"),
    ):
        with pytest.raises(GraphFileError, match=r"w\.safetensors.*" + message):
            Graph.load(rewrite(saved, into, **{name: change}))


def test_a_tensor_too_many(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(GraphFileError, match=r"extra=\['more'\]"):
        Graph.load(rewrite(saved, tmp_path / "w.safetensors", more=torch.ones(1)))


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(file: BinaryIO, *_: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("pycircuit.graph.io.graph_file.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        by_hand().save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


REQUIRED = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}


def written(graph: Graph, path: Path, **settings: Any) -> dict[str, Any]:
    graph.to_json(path, **settings)
    return json.loads(path.read_text())


def test_json_by_hand(tmp_path: Path) -> None:
    got = written(by_hand(), tmp_path / "g.json", slug="a-slug", node_threshold=1, edge_threshold=1)
    assert got["metadata"] == {
        "slug": "a-slug", "scan": "set", "transcoder_list": [], "prompt_tokens": [" w0"], "prompt": " w0",
        "node_threshold": 1, "schema_version": 1, "pruning_settings": {"node_threshold": 1, "edge_threshold": 1},
    }  # fmt: skip
    assert got["qParams"] == {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    by_id = {node["node_id"]: node for node in got["nodes"]}
    assert list(by_id) == ["0_5_0", "1_6_0", "0_-1_0", "1_-1_0", "E_7_0", "3_40_0"]
    feature, error, token, logit = (by_id[i] for i in ("1_6_0", "1_-1_0", "E_7_0", "3_40_0"))
    assert (feature["feature"], feature["layer"], feature["jsNodeId"]) == (7 * 8 // 2 + 6, "1", "1_6-0")
    assert feature["feature_type"] == "cross layer transcoder"
    assert feature["activation"] == 2.0
    assert feature["influence"] == pytest.approx(0.6 / 2.1)
    assert (error["feature"], error["layer"], error["jsNodeId"]) == (-1, "1", "1_-1-0")
    assert error["feature_type"] == "mlp reconstruction error"
    assert (token["feature"], token["layer"], token["jsNodeId"]) == (0, "E", "E_7-0")
    assert token["feature_type"] == "embedding"
    assert (logit["feature"], logit["layer"], logit["jsNodeId"], logit["token_prob"]) == (40, "3", "L_40-0", 1.0)
    assert logit["clerp"] == 'Output " t0" (p=1.000)'
    assert logit["is_target_logit"]
    assert not feature["is_target_logit"]
    assert {"source": "0_5_0", "target": "1_6_0", "weight": 2.0} in got["links"]
    assert {"source": "1_-1_0", "target": "3_40_0", "weight": -1.0} in got["links"]
    assert len(got["links"]) == 6


@pytest.mark.parametrize("seed", range(6))
def test_json_holds_what_pruning_kept(tmp_path: Path, seed: int) -> None:
    graph = random_graph(count=60, seed=seed)
    got, pruned = written(graph, tmp_path / "g.json"), graph.prune()
    ids = [node["node_id"] for node in got["nodes"]]
    assert len(ids) == len(set(ids)) == int(pruned.node_mask.sum())
    assert all(node.keys() >= REQUIRED for node in got["nodes"])
    assert len(got["links"]) == int(pruned.edge_mask.sum())
    assert {end for link in got["links"] for end in (link["source"], link["target"])} <= set(ids)
    assert all(0 <= n["influence"] <= 1 for n in got["nodes"] if n["feature_type"] != "logit")


def test_error_ids_do_not_collide_with_layer_0_features(tmp_path: Path) -> None:
    """Feature 1 of layer 0 at position 0 would share 0_1_0 with the error of layer 1 there."""
    graph = by_hand()
    graph = replace(graph, features=torch.tensor([[0, 0, 1], [1, 0, 6]]))
    ids = [node["node_id"] for node in written(graph, tmp_path / "g.json", node_threshold=1)["nodes"]]
    assert "0_1_0" in ids
    assert "1_-1_0" in ids
    assert len(ids) == len(set(ids)) == 6


def test_ids_of_errors_are_numbers_that_no_feature_has(tmp_path: Path) -> None:
    """Pages take ids from an address as layer_feature_position; jsNodeId says feature and layer."""
    nodes = written(random_graph(count=60), tmp_path / "g.json", node_threshold=1)["nodes"]
    errors, features = ([n for n in nodes if kind in n["feature_type"]] for kind in ("error", "transcoder"))
    for node in errors + features:
        layer, feature, position = map(int, node["node_id"].split("_"))
        assert (str(layer), position) == (node["layer"], node["ctx_idx"])
        assert (feature == -1) == (node in errors)
    assert errors and not {n["jsNodeId"] for n in errors} & {n["jsNodeId"] for n in features}
    assert len({n["jsNodeId"] for n in errors}) == len(errors)


def test_supernodes_reach_the_page(tmp_path: Path) -> None:
    """Pages draw the pinned members of groups whose names differ; one takes the groups from its address alone."""
    graph = random_graph(count=80)
    label = "a 100% & #1+"
    graph = replace(graph, labels={(layer, feature): label for layer, _, feature in graph.features[::2].tolist()})
    query = graph.to_json(tmp_path / "g.json", node_threshold=1, edge_threshold=1)
    content = json.loads((tmp_path / "g.json").read_text())
    parameters, ids = content["qParams"], {node["node_id"] for node in content["nodes"]}
    groups = parameters["supernodes"]
    assert [len(members) for _, *members in groups] == [len(g.nodes) for g in graph.supernodes(1, 1)]
    assert len({name for name, *_ in groups}) == len(groups) and [f"{label} (2)" in group for group in groups].count(
        True
    )
    assert parameters["pinnedIds"] == [node_id for _, *members in groups for node_id in members]
    assert set(parameters["pinnedIds"]) <= ids and 0 < len(parameters["pinnedIds"]) <= 200
    values = {name: unquote(value) for name, value in parse_qsl(query, strict_parsing=True)}
    assert values["slug"] == "g" and values["pinnedIds"].split(",") == parameters["pinnedIds"]
    assert json.loads(values["supernodes"]) == groups


def test_no_more_supernodes_than_can_be_pinned(tmp_path: Path) -> None:
    graph = cone_graph(layers=3, positions=12, active=12, expanded=396)
    parameters = written(graph, tmp_path / "g.json", node_threshold=1, edge_threshold=1)["qParams"]
    assert sum(len(g.nodes) for g in graph.supernodes(1, 1)) > 200
    assert len(parameters["pinnedIds"]) <= 200 and parameters["supernodes"]
    assert parameters["pinnedIds"] == [i for _, *members in parameters["supernodes"] for i in members]


def test_a_graph_of_one_layer_says_which_page_does_not_open_it(tmp_path: Path) -> None:
    graph = random_graph(layers=1)
    with pytest.warns(UserWarning, match=r"above layer 0 for Neuronpedia's page, which opens no other file"):
        graph.to_json(tmp_path / "g.json", node_threshold=1)
    assert json.loads((tmp_path / "g.json").read_text())["nodes"]  # for the other


def test_several_sets_of_transcoders_are_listed(tmp_path: Path) -> None:
    graph = by_hand()
    graph = replace(graph, provenance={**graph.provenance, "scan": ["org/one", "org/two"]})
    metadata = [written(graph, tmp_path / f"{name}.json")["metadata"] for name in "ab"]
    assert metadata[0]["transcoder_list"] == ["org/one", "org/two"]
    assert metadata[0]["scan"].startswith("custom-") and metadata[0]["scan"] == metadata[1]["scan"]


def test_targets_that_are_no_tokens(tmp_path: Path) -> None:
    graph = random_graph(targets=3)
    ids = torch.tensor([5, -1, 5])
    targets = Targets([" a(p=3)", "b - c", " d"], ids, graph.targets.weights, graph.targets.positions)
    nodes = written(replace(graph, targets=targets), tmp_path / "g.json")["nodes"]
    logits = [node for node in nodes if node["feature_type"] == "logit"]
    assert [node["feature"] for node in logits] == [5, 101, 102]
    for node, weight in zip(logits, graph.targets.weights.tolist(), strict=True):
        assert float(node["clerp"].split("(p=")[1].split(")")[0]) == weight


def test_overview_beside_the_graph(tmp_path: Path) -> None:
    for slug, share in (("one", 0.8), ("two", 0.8), ("one", 0.5)):
        by_hand().to_json(tmp_path / f"{slug}.json", node_threshold=share, scan="mine")
    graphs = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [(g["slug"], g["node_threshold"], g["scan"]) for g in graphs] == [("two", 0.8, "mine"), ("one", 0.5, "mine")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph-metadata.json", "one.json", "two.json"]


def test_broken_overview_is_left_alone(tmp_path: Path) -> None:
    overview = tmp_path / "graph-metadata.json"
    for text in ("{", "[]", '{"graphs": 3}', '{"graphs": [1]}'):
        overview.write_text(text)
        with pytest.raises(ValueError, match=r"graph-metadata\.json must be"):
            by_hand().to_json(tmp_path / "g.json")
        assert overview.read_text() == text


@pytest.mark.parametrize("slug", ["", "a/b", "a\\b", "a\n", 3])
def test_slugs(tmp_path: Path, slug: Any) -> None:
    with pytest.raises(ValueError, match="slug must be"):
        by_hand().to_json(tmp_path / "g.json", slug=slug)


def test_scan_must_be_a_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Graph\.to_json: scan must be a string, got int"):
        by_hand().to_json(tmp_path / "g.json", scan=3)
    with pytest.raises(ValueError, match=r"Graph\.to_json: node_threshold must be from 0 to 1, got 2"):
        by_hand().to_json(tmp_path / "g.json", node_threshold=2)
    assert list(tmp_path.iterdir()) == []
    got = written(by_hand(), tmp_path / "g.json", node_threshold=np.float32(0.5))
    assert got["metadata"]["node_threshold"] == 0.5


def test_networkx() -> None:
    graph = random_graph()
    out = graph.to_networkx()
    dense = graph.dense()
    assert out.number_of_nodes() == graph.nodes
    assert out.number_of_edges() == graph.rows.entries
    assert all(data["weight"] == float(dense[t, s]) for s, t, data in out.edges(data=True))
    assert out.nodes[0] == graph.describe(0)


def test_scipy() -> None:
    graph = random_graph()
    assert (graph.to_scipy().toarray() == graph.dense().numpy()).all()


@pytest.mark.parametrize(("method", "module"), [("to_networkx", "networkx"), ("to_scipy", "scipy.sparse")])
def test_absent_libraries(monkeypatch: pytest.MonkeyPatch, method: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"Graph\.{method}: \w+ must be installed, .*; pip install"):
        getattr(by_hand(), method)()
