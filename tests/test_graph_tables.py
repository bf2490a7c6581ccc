"""Tests of graphs as tables, Parquet files and GraphML."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from graphs import by_hand, random_graph

from pycircuit.graph import Graph
from pycircuit.graph.identifiers import identifier, node_of

ODD = 'a <b> & "c" \x00\x1b\ud800 \n é 日'


def odd_graph() -> Graph:
    graph = random_graph(count=40)
    layer, _, feature = graph.features[3].tolist()
    return replace(graph, labels={(layer, feature): ODD}, provenance={"deep": {"list": [1, None]}})


def test_tables_hold_the_graph() -> None:
    graph = random_graph(count=40)
    nodes, edges = graph.tables()["nodes"], graph.tables()["edges"]
    assert {len(column) for column in nodes.values()} == {graph.nodes}
    dense = torch.zeros(graph.nodes, graph.nodes, dtype=torch.float64)
    dense[torch.from_numpy(edges["target"]), torch.from_numpy(edges["source"])] = torch.from_numpy(edges["weight"])
    assert torch.equal(dense, graph.dense())
    for node in range(graph.nodes):
        description = graph.describe(node)
        for name in ("layer", "position", "feature", "token"):
            assert nodes[name][node] == description.get(name, -1)
        assert nodes["kind"][node] == description["kind"] and nodes["id"][node] == identifier(graph, node)
        assert nodes["label"][node] == description.get("label", "")
    assert np.allclose(nodes["influence"], graph.influence().numpy())
    shares = np.bincount(edges["target"], edges["share"], minlength=graph.nodes)
    assert np.allclose(shares[shares > 0], 1)


def test_the_law_can_be_checked_from_the_tables() -> None:
    graph = random_graph(count=40).prune().graph
    nodes, edges = graph.tables()["nodes"], graph.tables()["edges"]
    sums = np.bincount(edges["target"], edges["weight"], minlength=graph.nodes) + nodes["bias"] + nodes["dropped"]
    rows = graph.row_node.numpy()
    assert np.abs(sums - nodes["preactivation"])[rows].max() < 1e-12
    assert np.isnan(np.delete(nodes["preactivation"], rows)).all()
    unknown = replace(graph, provenance={"law": "unknown"}).tables()["nodes"]
    assert np.isnan(unknown["preactivation"]).all()


@pytest.mark.parametrize("make", [odd_graph, by_hand, lambda: random_graph(count=0)], ids=["odd", "by_hand", "empty"])
def test_parquet(tmp_path: Path, make: Any) -> None:
    graph = make()
    for _ in range(2):  # the second replaces the first
        graph.to_parquet(tmp_path / "tables")
    assert sorted(p.name for p in (tmp_path / "tables").iterdir()) == ["edges.parquet", "nodes.parquet"]
    read = {name: parquet.read_table(tmp_path / "tables" / f"{name}.parquet") for name in ("nodes", "edges")}
    about = json.loads(read["nodes"].schema.metadata[b"pycircuit"])
    assert about == {"prompt": graph.prompt, "layers": graph.layers, "provenance": graph.provenance}
    for name, columns in graph.tables().items():
        for column, values in columns.items():
            got = read[name][column].to_pylist()
            if isinstance(values, list):
                assert got == [text.replace("\ud800", "?") for text in values]
            else:
                assert got == [None if (v < 0 and values.dtype.kind == "i") or v != v else v for v in values.tolist()]
    assert read["edges"].schema.field("weight").type == read["nodes"].schema.field("value").type == "double"


def test_places_of_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"Graph\.to_parquet: folder must be a folder, got the file"):
        by_hand().to_parquet(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"Graph\.to_parquet: folder must be in a folder that exists"):
        by_hand().to_parquet(tmp_path / "absent" / "tables")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"Graph\.to_parquet: pyarrow must be installed, .*; pip install pyarrow"):
        by_hand().to_parquet(tmp_path / "tables")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [odd_graph, by_hand], ids=["odd", "by_hand"])
def test_graphml_is_read_by_networkx(tmp_path: Path, make: Any) -> None:
    graph = make()
    graph.to_graphml(tmp_path / "g.graphml")
    got = networkx.read_graphml(tmp_path / "g.graphml")
    nodes = graph.tables()["nodes"]
    assert got.is_directed() and list(got) == [f"n{node}" for node in range(graph.nodes)]
    dense = graph.dense()
    assert got.number_of_edges() == graph.rows.entries
    assert all(data["weight"] == float(dense[int(t[1:]), int(s[1:])]) for s, t, data in got.edges(data=True))
    for node in range(graph.nodes):
        data, description = got.nodes[f"n{node}"], graph.describe(node)
        assert (data["kind"], data["id"]) == (description["kind"], nodes["id"][node])
        assert ("feature" in data) == (description["kind"] == "feature")
        assert data.get("layer") == description.get("layer") and data["influence"] == nodes["influence"][node]
        expected = description.get("label", "")
        assert data.get("label", "") == expected.replace("\x00\x1b\ud800", "���")


def test_identifiers() -> None:
    graph = random_graph(count=40)
    for node in range(graph.nodes):
        assert node_of(graph, identifier(graph, node)) == node
    layer, position, feature = graph.features[0].tolist()
    assert node_of(graph, f"{layer}/{position - graph.positions}/{feature}") == 0
    assert [identifier(graph, n) for n in (graph.error_node(2, 1), graph.token_node(2), graph.target_node(1))] == [
        "error/2/1", "token/2", "target/1",
    ]  # fmt: skip
    for text in ("0/0/999", "error/9/0", "error/0/9", "token/3", "target/2", "0/-9/0"):
        with pytest.raises(ValueError, match=f"--paths: a node must be in the graph, got {text}"):
            node_of(graph, text, "--paths")
    for text in ("", "0/1", "token/", "token/-1", "error/0", "0/0/0/0", "a" * 500, "token/1\n", "token/٣"):
        with pytest.raises(ValueError, match=r"node_of: a node must be LAYER/POSITION/FEATURE, error/") as refusal:
            node_of(graph, text)
        assert len(str(refusal.value)) < 250
