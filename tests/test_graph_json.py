"""Tests of the JSON that pages read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import numpy as np
import pytest
import torch
from graphs import by_hand, cone_graph, random_graph
from page_schema import drawn, scores, violations

import pycircuit as pc
from pycircuit.graph import Graph, Targets

URL = "https://github.com/pycircuit/pycircuit"
REQUIRED = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}


def written(graph: Graph, path: Path, **settings: Any) -> dict[str, Any]:
    graph.to_json(path, **settings)
    return json.loads(path.read_text())


def test_json_by_hand(tmp_path: Path) -> None:
    got = written(by_hand(), tmp_path / "g.json", slug="a-slug", node_threshold=1, edge_threshold=1)
    generator = {"name": "pycircuit", "version": pc.__version__, "url": URL}
    assert got["metadata"].pop("info") == {"generator": generator}
    assert got["metadata"] == {
        "slug": "a-slug", "scan": "set", "transcoder_list": [], "prompt_tokens": [" w0"], "prompt": " w0",
        "node_threshold": 1, "schema_version": 1, "pruning_settings": {"node_threshold": 1, "edge_threshold": 1},
        "generation_settings": {"layers": 2, "vocab_size": 100},
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
    wanted = graph.supernodes(1, 1, method="label")
    query = graph.to_json(tmp_path / "g.json", node_threshold=1, edge_threshold=1, groups=wanted)
    content = json.loads((tmp_path / "g.json").read_text())
    parameters, ids = content["qParams"], {node["node_id"] for node in content["nodes"]}
    groups = parameters["supernodes"]
    assert [len(members) for _, *members in groups] == [len(g.nodes) for g in wanted]
    assert len({name for name, *_ in groups}) == len(groups) and [f"{label} (2)" in group for group in groups].count(
        True
    )
    assert parameters["pinnedIds"] == [node_id for _, *members in groups for node_id in members]
    assert set(parameters["pinnedIds"]) <= ids and 0 < len(parameters["pinnedIds"]) <= 200
    values = {name: unquote(value) for name, value in parse_qsl(query, strict_parsing=True)}
    assert values["slug"] == "g" and values["pinnedIds"].split(",") == parameters["pinnedIds"]
    assert json.loads(values["supernodes"]) == groups


def test_supernodes_by_structure_are_the_default(tmp_path: Path) -> None:
    graph = random_graph(count=80)
    graph = replace(graph, labels={(layer, feature): "one name" for layer, _, feature in graph.features.tolist()})
    groups = written(graph, tmp_path / "g.json", node_threshold=1, edge_threshold=1)["qParams"]["supernodes"]
    default, structure = graph.supernodes(1, 1), graph.supernodes(1, 1, method="structure")
    assert default == structure != graph.supernodes(1, 1, method="label")
    assert [(name, len(members)) for name, *members in groups] == [(g.name, len(g.nodes)) for g in structure]
    assert all(group.name.startswith("one name at ") for group in structure)


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


# Neuronpedia


def large_features() -> Graph:
    """Features of a wide transcoder in a late layer, whose numbers are near the largest of JavaScript."""
    return replace(by_hand(), features=torch.tensor([[0, 0, 2**24 - 1], [25, 0, 2**24 - 7]]), layers=26, **longer(26))


def longer(layers: int) -> dict[str, Any]:
    """Fields of the graph made by hand in a model of more layers."""
    rows = by_hand().rows
    shifted = torch.where(rows.column == 3, 2 + 25, torch.where(rows.column == 4, 2 + layers, rows.column))
    node = by_hand().row_node
    return {
        "rows": pc.graph.Rows(rows.row_ptr, shifted.to(torch.int32), rows.weight),
        "row_node": torch.where(node == 5, 2 + layers + 1, node),
    }


def two_layers() -> Graph:
    return random_graph(count=60, seed=3)


def one_layer() -> Graph:
    return random_graph(layers=1)


@pytest.mark.parametrize("flavour", ["circuit-tracer", "neuronpedia"])
@pytest.mark.parametrize("make", [by_hand, two_layers, one_layer, large_features])
@pytest.mark.filterwarnings("ignore:Graph.to_json. features or errors must be above layer 0")
def test_published_schema(tmp_path: Path, make: Any, flavour: Any) -> None:
    details = {"neuronpedia_source_set": "clt-hp"}
    got = written(make(), tmp_path / "g.json", flavour=flavour, feature_details=details, node_threshold=1)
    assert violations(got) == []
    assert got["metadata"]["schema_version"] == 1 and got["metadata"]["feature_details"] == details


@pytest.mark.parametrize("make", [by_hand, two_layers, one_layer, large_features])
def test_neuronpedia_opens_it(tmp_path: Path, make: Any) -> None:
    graph = make()
    got = written(graph, tmp_path / "g.json", flavour="neuronpedia", node_threshold=1, edge_threshold=1)
    page, pruned = drawn(got), graph.prune(1, 1)
    for layer, position, feature in graph.features[pruned.node_mask[: graph.first_error]].tolist():
        assert page[f"{layer}_{feature}_{position}"] == (layer, feature)
    probabilities = [value for value in page.values() if isinstance(value, float)]
    assert probabilities == pytest.approx(graph.targets.weights.tolist(), abs=5e-4)
    assert [n["token_prob"] for n in got["nodes"] if n["feature_type"] == "logit"] == graph.targets.weights.tolist()
    assert scores(got) == pytest.approx(pruned.graph.scores(), rel=1e-9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.json"]  # the overview is circuit-tracer's


def test_a_graph_of_one_layer_opens_by_a_node_that_says_so(tmp_path: Path) -> None:
    graph = one_layer()
    with pytest.raises(ValueError, match="No layer found"), pytest.warns(UserWarning, match="flavour='neuronpedia'"):
        drawn(written(graph, tmp_path / "c.json"))
    got = written(graph, tmp_path / "n.json", flavour="neuronpedia")
    added = next(n for n in got["nodes"] if n["layer"] == "1")
    assert (
        added["feature_type"] == "mlp reconstruction error" and added["influence"] == 1 and added["activation"] is None
    )
    assert not any(added["node_id"] in (link["source"], link["target"]) for link in got["links"])
    assert added["node_id"] in got["metadata"]["info"]["description"]
    count = int(graph.prune().node_mask.sum())
    assert len(got["nodes"]) == count + 1
    again = Graph.from_json(tmp_path / "n.json")  # which reads it as nothing
    assert again.layers == 1 and len(again.features) == int(graph.prune().node_mask[: graph.first_error].sum())


def test_names_on_neuronpedia(tmp_path: Path) -> None:
    graph = by_hand()
    model = replace(graph, provenance={"model": "google/gemma-2-2b"})
    got = written(model, tmp_path / "a graph & more.json", flavour="neuronpedia")["metadata"]
    assert (got["slug"], got["scan"]) == ("a-graph-more", "gemma-2-2b")
    assert written(model, tmp_path / "g.json", flavour="neuronpedia", scan="qwen3-4b")["metadata"]["scan"] == "qwen3-4b"
    for name, settings in (("slug", {"slug": "a b"}), ("scan", {"scan": "org/model"}), ("scan", {"scan": ""})):
        with pytest.raises(ValueError, match=rf"Graph\.to_json: {name} must be letters, digits"):
            model.to_json(tmp_path / "no.json", flavour="neuronpedia", **settings)
    with pytest.raises(ValueError, match="got ''; name the model's id there with scan="):
        replace(graph, provenance={}).to_json(tmp_path / "no.json", flavour="neuronpedia")
    with pytest.raises(ValueError, match="flavour must be one of circuit-tracer, neuronpedia, got 'html'"):
        graph.to_json(tmp_path / "no.json", flavour="html")  # type: ignore[arg-type]
    for details in ({"base_url": "x"}, {"neuronpedia_source_set": 3}, {"neuronpedia_source_set": ""}):
        with pytest.raises(ValueError, match="feature_details must be texts of feature_json_base_url"):
            graph.to_json(tmp_path / "no.json", feature_details=details)
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    "page", [3, {}, {"groups": 3}, {"groups": [3, [], [1, 2]], "pinned": [None, "x"]}, {"pinned": {}}]
)
def test_pins_and_groups_of_another_kind_in_a_file(tmp_path: Path, page: Any) -> None:
    graph = by_hand()
    got = written(replace(graph, provenance={**graph.provenance, "page": page}), tmp_path / "g.json", node_threshold=1)
    assert got["qParams"]["pinnedIds"] == got["qParams"]["supernodes"] == []


def test_groups_and_pins_asked_for(tmp_path: Path) -> None:
    """Nodes in them are written whatever the thresholds, with their edges to the nodes that remain."""
    graph = random_graph(count=80, seed=1)
    pruned = graph.prune(0.5, 0.5)
    left_out = (~pruned.node_mask[: graph.first_error]).nonzero()[:2, 0].tolist()
    inside = pruned.node_mask[: graph.first_error].nonzero()[:2, 0].tolist()
    groups = [("mine", left_out), ("mine", inside)]
    query = graph.to_json(
        tmp_path / "g.json", flavour="neuronpedia", node_threshold=0.5, edge_threshold=0.5, groups=groups,
        pinned=[graph.token_node(0)],
    )  # fmt: skip
    got = json.loads((tmp_path / "g.json").read_text())

    def ids(nodes: list[int]) -> list[str]:
        return [f"{la}_{f}_{p}" for la, p, f in graph.features[nodes].tolist()]

    assert got["qParams"]["supernodes"] == [["mine", *ids(left_out)], ["mine (2)", *ids(inside)]]
    assert got["qParams"]["pinnedIds"] == [*ids(left_out), *ids(inside), "E_7_0"]
    assert len(got["nodes"]) == int(pruned.node_mask.sum()) + 2
    present, dense = {n["node_id"] for n in got["nodes"]}, graph.dense()
    links = {(link["source"], link["target"]): link["weight"] for link in got["links"]}
    assert len(links) > int(pruned.edge_mask.sum())
    for source in left_out:
        for target in dense[:, source].nonzero()[:, 0].tolist():
            name = ids([target])[0] if target < graph.first_error else f"5_{40 + target - graph.first_target}_2"
            if name in present:
                assert links.pop((ids([source])[0], name)) == float(dense[target, source])
    values = dict(parse_qsl(query, strict_parsing=True))
    assert values["pinnedIds"].split(",") == got["qParams"]["pinnedIds"]
    assert json.loads(values["supernodes"]) == got["qParams"]["supernodes"]
    with pytest.raises(ValueError, match=r"pinned must be"):
        graph.to_json(tmp_path / "g.json", pinned=[graph.nodes])
