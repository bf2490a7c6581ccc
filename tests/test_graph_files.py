"""Tests of graphs in safetensors files and as objects of other libraries."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from graphs import by_hand, random_graph
from safetensors.torch import load_file, safe_open, save_file

from pycircuit.graph import Graph, GraphFileError, Rows


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
        header = file.metadata() if metadata is None else metadata
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, into, header)
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
    data, cut = saved.read_bytes(), tmp_path / "cut.safetensors"
    lengths = {*range(0, len(data), 37), *range(12), len(data) - 1}
    for length in sorted(lengths):
        cut.write_bytes(data[:length])
        with pytest.raises(GraphFileError, match=r"cut\.safetensors must be a whole safetensors file"):
            Graph.load(cut)
    cut.write_bytes(data + b"x")
    with pytest.raises(GraphFileError, match=r"cut\.safetensors"):
        Graph.load(cut)


def test_damaged_bytes_never_give_another_error(saved: Path, tmp_path: Path) -> None:
    data, bad = saved.read_bytes(), tmp_path / "bad.safetensors"
    refused = 0
    for offset in range(0, len(data), 23):
        bad.write_bytes(data[:offset] + bytes([data[offset] ^ 0x5A]) + data[offset + 1 :])
        try:
            Graph.load(bad)
        except GraphFileError as error:
            assert "bad.safetensors" in str(error)
            refused += 1
    assert refused > 20


def test_whatever_loads_is_a_graph(saved: Path, tmp_path: Path) -> None:
    """Runs of damaged bytes: an error that names the file, or a graph that everything works on."""
    data, bad, rng = saved.read_bytes(), tmp_path / "bad.safetensors", np.random.default_rng(0)
    loaded = 0
    for _ in range(300):
        damaged, offset = bytearray(data), int(rng.integers(len(data)))
        for i in range(offset, min(len(data), offset + int(rng.integers(1, 9)))):
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
