"""circuit-tracer's `.pt` graphs, without circuit-tracer: files in its layout, hostile ones, and ours written for it."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from graphs import by_hand, random_graph
from torch import Tensor

from pycircuit.graph import Graph, GraphFileError, Rows, Targets

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, POSITIONS, VOCABULARY = 2, 2, 50


class LogitTarget(NamedTuple):
    token_str: str
    vocab_idx: int


@dataclass
class UnifiedConfig:
    n_layers: int = LAYERS
    d_model: int = 8
    d_head: int = 4
    n_heads: int = 2
    d_mlp: int = 16
    d_vocab: int = VOCABULARY
    tokenizer_name: str = "org/tokenizer"
    model_name: str = "org/model"
    original_architecture: str = "Gemma"
    n_key_value_heads: int | None = None
    dtype: Any = torch.bfloat16


@dataclass
class HookedTransformerConfig(UnifiedConfig):
    """As TransformerLens had it, with a number of NumPy's."""

    attn_scale: Any = None
    device: Any = None


PLACES = {
    "circuit_tracer.attribution.targets": LogitTarget,
    "circuit_tracer.utils.tl_nnsight_mapping": UnifiedConfig,
    "transformer_lens.HookedTransformerConfig": HookedTransformerConfig,
}


@pytest.fixture(autouse=True)
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Their classes where pickle looks for them; calling it takes them away."""
    with monkeypatch.context() as there:
        for module, of in PLACES.items():
            parts = module.split(".")
            for n in range(1, len(parts) + 1):
                there.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
            setattr(sys.modules[module], of.__name__, of)
            there.setattr(of, "__module__", module)
        yield there.undo


def content() -> dict[str, Any]:
    """Three active features, two of them selected; two targets, of which one is no token."""
    nodes = 2 + LAYERS * POSITIONS + POSITIONS + 2
    matrix = torch.zeros(nodes, nodes)
    matrix[0, 6] = 0.5  # feature 0 (layer 0) from the first token
    matrix[1, [0, 2, 7]] = torch.tensor([2.0, -1.0, 0.25])  # feature 2 (layer 1) from it, an error, the other token
    matrix[8, [0, 1]] = torch.tensor([1.5, 3.0])
    matrix[9, [1, 5]] = torch.tensor([-2.0, 1.0])
    return {
        "input_string": "<bos>a",
        "adjacency_matrix": matrix,
        "cfg": UnifiedConfig(),
        "active_features": torch.tensor([[0, 0, 1], [1, 1, 1], [3, 4, 5]]).T,
        "logit_targets": [LogitTarget(" b", 7), LogitTarget("b - c", VOCABULARY + 1)],
        "logit_probabilities": torch.tensor([0.75, 0.25]),
        "vocab_size": VOCABULARY,
        "input_tokens": torch.tensor([2, 9]),
        "selected_features": torch.tensor([0, 2]),
        "activation_values": torch.tensor([1.0, 2.0, 4.0]),
        "scan": "org/transcoders",
    }


def saved(path: Path, **changes: Any) -> Path:
    """None: taken away."""
    torch.save({k: v for k, v in {**content(), **changes}.items() if v is not None}, path)
    return path


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return {2: "<bos>", 9: "a"}.get(ids[0], f"<{ids[0]}>")


def test_a_file_as_theirs(tmp_path: Path, theirs: Callable[[], None]) -> None:
    path = saved(tmp_path / "g.pt")
    theirs()  # read without their library
    assert "circuit_tracer" not in sys.modules
    graph = Graph.from_circuit_tracer(path, Tokenizer())
    assert graph.features.tolist() == [[0, 1, 3], [0, 1, 4], [1, 1, 5]] and graph.values.tolist() == [1, 2, 4]
    assert (graph.layers, graph.positions, graph.vocab_size, graph.prompt) == (2, 2, VOCABULARY, "<bos>a")
    assert graph.tokens.ids.tolist() == [2, 9] and graph.tokens.text == ["<bos>", "a"]
    assert graph.targets.labels == [" b", "b - c"] and graph.targets.ids.tolist() == [7, -1]
    assert graph.targets.weights.tolist() == [0.75, 0.25] and graph.targets.positions.tolist() == [1, 1]
    dense, f, e, t, g = graph.dense(), graph.feature_node, graph.error_node, graph.token_node, graph.target_node
    low, high = f(0, 1, 3), f(1, 1, 5)
    expected = torch.zeros_like(dense)
    for (into, source), weight in {
        (low, t(0)): 0.5, (high, low): 2.0, (high, e(0, 0)): -1.0, (high, t(1)): 0.25, (g(0), low): 1.5,
        (g(0), high): 3.0, (g(1), high): -2.0, (g(1), e(1, 1)): 1.0,
    }.items():  # fmt: skip
        expected[into, source] = weight
    assert torch.equal(dense, expected)
    assert graph.row_node.tolist() == [low, high, g(0), g(1)]
    assert graph.provenance["model"] == "org/model" and graph.provenance["scan"] == "org/transcoders"


def test_nothing_is_claimed_of_the_law(tmp_path: Path) -> None:
    graph = Graph.from_circuit_tracer(saved(tmp_path / "g.pt"))
    for one in (graph, graph.prune(1, 1).graph):
        assert np.isnan(one.certificate) and bool(one.residual.isnan().all())
    graph.save(tmp_path / "g.safetensors")
    assert np.isnan(Graph.load(tmp_path / "g.safetensors").certificate)


def test_a_file_outlives_nothing(tmp_path: Path) -> None:
    """What was read stays when the file goes."""
    doubles = {name: content()[name].double() for name in ("activation_values", "logit_probabilities")}
    path = saved(tmp_path / "g.pt", active_features=content()["active_features"].contiguous(), **doubles)
    graph = Graph.from_circuit_tracer(path)
    before = graph.dense()
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(graph.dense(), before) and graph.values.tolist() == [1, 2, 4]
    assert graph.features.tolist() == [[0, 1, 3], [0, 1, 4], [1, 1, 5]]
    assert graph.targets.weights.tolist() == [0.75, 0.25]
    assert graph.tokens.text == ["2", "9"] and graph.tokens.ids.tolist() == [2, 9]


def old_config() -> Any:
    found = HookedTransformerConfig(attn_scale=np.sqrt(4.0), device=torch.device("cpu"))
    del found.original_architecture
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"cfg": old_config()},
        {"logit_targets": torch.tensor([7, 8])},
        {"logit_targets": None, "logit_tokens": torch.tensor([7, 8])},
        {"vocab_size": None, "scan": None},
        {"scan": ["one", "two"], "adjacency_matrix": content()["adjacency_matrix"].to(torch.bfloat16)},
        {"logit_probabilities": torch.tensor([0.75, 0.25], dtype=torch.bfloat16, requires_grad=True)},
    ],
    ids=["old_config", "target_ids", "older_target_ids", "no_scan", "scans_and_bfloat16", "with_gradient"],
)
def test_files_of_other_versions(tmp_path: Path, theirs: Callable[[], None], changes: dict[str, Any]) -> None:
    path = saved(tmp_path / "g.pt", **changes)
    theirs()
    graph, usual = Graph.from_circuit_tracer(path, Tokenizer()), content()
    assert graph.layers == 2 and graph.rows.entries == 8 and graph.vocab_size == VOCABULARY
    assert graph.targets.ids.tolist()[0] == 7 and graph.rows.weight.dtype == torch.float32
    assert graph.targets.labels[0] == ("<7>" if "logit_targets" in changes else " b")
    assert graph.provenance.get("scan") == changes.get("scan", usual["scan"])


@pytest.mark.parametrize("names", ["org/new", ["org/one", "org/two"]], ids=["one", "several"])
def test_files_that_say_scan_name_keep_it(tmp_path: Path, names: Any) -> None:
    """As circuit-tracer writes since July 2026, and as every version of it reads again."""
    graph = Graph.from_circuit_tracer(saved(tmp_path / "g.pt", scan=None, scan_name=names))
    assert graph.provenance["scan"] == names
    graph.to_circuit_tracer(tmp_path / "again.pt")
    assert torch.load(tmp_path / "again.pt", weights_only=False)["scan"] == names
    with pytest.raises(GraphFileError, match="scan must be a string or a list of strings, got dict"):
        Graph.from_circuit_tracer(saved(tmp_path / "g.pt", scan=None, scan_name={}))


def test_the_same_graph_has_the_same_bytes(tmp_path: Path) -> None:
    """Under any name, from any process, and after it was saved and loaded."""
    graph = random_graph()
    graph.save(tmp_path / "g.safetensors")
    for name, of in (("a", graph), ("a_longer_name", graph), ("loaded", Graph.load(tmp_path / "g.safetensors"))):
        of.to_circuit_tracer(tmp_path / f"{name}.pt")
    first, *others = (path.read_bytes() for path in sorted(tmp_path.glob("*.pt")))
    assert all(data == first for data in others)
    assert str(os.getpid()).encode() not in first


def test_selected_features_in_any_order(tmp_path: Path) -> None:
    usual, turned = content(), content()
    swap = torch.tensor([1, 0, *range(2, 10)])
    turned["selected_features"] = turned["selected_features"].flip(0)
    turned["adjacency_matrix"] = turned["adjacency_matrix"][swap][:, swap]
    graphs = [Graph.from_circuit_tracer(saved(tmp_path / "g.pt", **c)) for c in (usual, turned)]
    assert torch.equal(graphs[0].dense(), graphs[1].dense())


class Hostile:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.how = (function, args)

    def __reduce__(self) -> Any:
        return self.how


@pytest.mark.parametrize("how", ["torch", "in_targets", "in_config", "plain", "legacy", "polyglot"])
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path: Path, theirs: Callable[[], None], how: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "g.pt"
    bad = Hostile(os.system, f"touch {mark}")
    if how == "torch":
        saved(path, scan=bad)
    elif how == "in_targets":
        saved(path, logit_targets=[LogitTarget(bad, 3)])  # type: ignore[arg-type]
    elif how == "in_config":
        saved(path, cfg=UnifiedConfig(dtype=Hostile(eval, f"open({str(mark)!r}, 'w')")))
    elif how == "legacy":
        torch.save({**content(), "scan": bad}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps({**content(), "scan": bad}))
    if how == "polyglot":
        with zipfile.ZipFile(path, "a") as archive:  # a pickle that is an archive too
            archive.writestr("g/data.pkl", pickle.dumps(bad, 2))
            archive.writestr("g/version", "3\n")
    theirs()
    with pytest.raises(GraphFileError, match=r"Graph\.from_circuit_tracer: .*g\.pt must (hold|be)"):
        Graph.from_circuit_tracer(path)
    assert not mark.exists()
    if how in ("torch", "in_config", "in_targets"):
        with pytest.raises(GraphFileError, match=r"GLOBAL (posix\.system|__builtin__\.eval)"):
            Graph.from_circuit_tracer(path)
        if how == "torch":
            pickle.loads(pickle.dumps(bad))
            assert mark.exists()  # it would have run


def laughs() -> list[Any]:
    """Nothing in a file, and 4**60 words where it is written out."""
    found: list[Any] = ["ha"]
    for _ in range(60):
        found = [found] * 4
    return found


@pytest.mark.parametrize("name", ["scan", "input_string", "vocab_size", "logit_targets", "cfg", "adjacency_matrix"])
def test_lists_that_explode_where_they_are_written_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(GraphFileError, match="must hold a sound graph") as caught:
        Graph.from_circuit_tracer(saved(tmp_path / "g.pt", **{name: laughs()}))
    assert len(str(caught.value)) < 500
    with pytest.raises(GraphFileError, match="must hold a sound graph"):
        Graph.from_circuit_tracer(with_opcodes(tmp_path / "g.pt", name, b"]" * 100_000 + b"a" * 99_999))


def with_opcodes(path: Path, name: str, opcodes: bytes) -> Path:
    """What these opcodes make, in the place of a value."""
    there = b"X\x04\0\0\0MARK"
    saved(path, **{name: "MARK"})

    def change(member: str, data: bytes) -> bytes:
        assert not member.endswith("data.pkl") or there in data
        return data.replace(there, opcodes) if member.endswith("data.pkl") else data

    repacked(path, change)
    return path


CONFIG = b"ccircuit_tracer.utils.tl_nnsight_mapping\nUnifiedConfig\n"
REBUILD, CODEC = b"ctorch._utils\n_rebuild_", b"c_codecs\nencode\n"
OPCODES = {
    "memory": (b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R", r"GLOBAL builtins\.bytearray"),
    "typed_memory": (b"ctorch\nFloatTensor\n\x8a\x05\0\0\0\0\x02\x85R", r"GLOBAL torch\.FloatTensor"),
    "meta": (REBUILD + b"meta_tensor_no_storage\n)R", "GLOBAL .*meta"),
    "nested": (REBUILD + b"nested_tensor\n)R", "GLOBAL .*nested"),
    "sparse": (REBUILD + b"sparse_tensor\n)R", "GLOBAL .*sparse"),
    "parameter": (REBUILD + b"parameter\n)R", "GLOBAL .*parameter"),
    "tensor_of_nothing": (REBUILD + b"tensor_v2\n(NK\0))NNtR", "a tensor that is not plain"),
    "class_changed": (CONFIG + b"N}X\x0c\0\0\0__setstate__K\1s\x86b", "state for type"),
    "storage": (b"(X\7\0\0\0storageNX\1\0\0\x000X\3\0\0\0cpuK\1tQ", "a storage that torch"),
    "item_of_a_type": (b"ctorch\nfloat32\nK\0K\0s", "TypeError"),
    "frame": (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", "KeyError"),
    "extension": (b"\x82\1", "KeyError"),
    "called_number": (b"K\1)R", "TypeError"),
    "short": (b"X\xff\xff\xff\x7f", "Error"),
}  # fmt: skip


@pytest.mark.parametrize("how", OPCODES)
def test_opcodes_that_no_graph_needs(tmp_path: Path, how: str) -> None:
    opcodes, said = OPCODES[how]
    path = with_opcodes(tmp_path / "g.pt", "scan", opcodes)
    with pytest.raises(GraphFileError, match=rf"must hold plain values and tensors, got .*{said}"):
        Graph.from_circuit_tracer(path)
    assert Graph.from_circuit_tracer(saved(path)).layers == LAYERS  # nothing of it stays


def test_values_changed_at_random_never_give_another_error(tmp_path: Path) -> None:
    """Bytes of the pickle changed, opcodes put in and taken out, in an archive that is sound."""
    path, rng, refused = tmp_path / "g.pt", np.random.default_rng(0), 0
    opcodes = [*(bytes([code]) for code in b")]}(tRbsueaN\x81\x85Q"), b"h\5", b"q\5"]

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        for at in rng.integers(len(data), size=rng.integers(1, 4)).tolist():
            new = opcodes[rng.integers(len(opcodes))] if rng.random() < 0.6 else bytes([rng.integers(256)])
            data = data[:at] + new + data[at + rng.integers(3) :]
        return data

    for _ in range(300):
        repacked(saved(path), change)
        try:
            Graph.from_circuit_tracer(path).dense()
        except GraphFileError:
            refused += 1
    assert 250 < refused < 300


def test_names_stand_for_nothing_that_computes(tmp_path: Path) -> None:
    """A codec would double its bytes as often as it is asked to."""
    once = CODEC + b"q\xf0X\1\0\0\0aX\x06\0\0\0latin1\x86R"
    path = with_opcodes(tmp_path / "g.pt", "scan", once + 60 * b"q\xf1h\xf0h\xf1X\3\0\0\0hex\x86R")
    with pytest.raises(GraphFileError, match="must hold a sound graph, got: scan must be a string"):
        Graph.from_circuit_tracer(path)


def test_files_of_an_archive_have_places_of_their_own(tmp_path: Path) -> None:
    """Many that share one would take hours to check."""
    path, count = saved(tmp_path / "g.pt"), 1000
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        held, start = len(archive.infolist()), archive.start_dir
    entry = data[start : data.index(b"PK\1\2", start + 4)]
    entries = data[start : start + data[start:].index(b"PK\5\6")].split(b"PK\6\6")[0] + entry * count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, held + count, held + count, len(entries), start, 0)
    path.write_bytes(data[:start] + entries + end)
    with pytest.raises(GraphFileError, match="must hold everything once, got"):
        Graph.from_circuit_tracer(path)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no_matrix": ({"adjacency_matrix": None}, "adjacency_matrix"),
    "wrong_matrix": ({"adjacency_matrix": torch.zeros(9, 9)}, r"must be \[10, 10\] \(2 selected features, 6 errors"),
    "flat_matrix": ({"adjacency_matrix": torch.zeros(100)}, "must be 2-dimensional"),
    "stretched": ({"adjacency_matrix": torch.zeros(1, 1).expand(10, 10)}, "adjacency_matrix must lie in the file"),
    "huge": ({"adjacency_matrix": torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))}, "must lie in the file"),
    "nan": ({"adjacency_matrix": content()["adjacency_matrix"].where(content()["adjacency_matrix"] != 3, torch.nan)},
            "rows.weight must be finite"),
    "upward": ({"active_features": torch.tensor([[1, 1, 3], [0, 1, 4], [0, 1, 5]])}, "lower layers only"),
    "into_token": ({"adjacency_matrix": torch.ones(10, 10)}, "no edge into errors and tokens"),
    "matrix_of_ints": ({"adjacency_matrix": torch.zeros(10, 10, dtype=torch.int64)}, "one of"),
    "selected_beyond": ({"selected_features": torch.tensor([0, 3])}, "selected_features must be from 0 to below 3"),
    "selected_twice": ({"selected_features": torch.tensor([2, 2])}, "selected_features must be distinct"),
    "layer_beyond": ({"active_features": torch.tensor([[0, 1, 3], [0, 1, 4], [2, 1, 5]])}, "layer must be from 0 to"),
    "values": ({"activation_values": torch.ones(2)}, "values must have shape"),
    "probabilities": ({"logit_probabilities": torch.ones(3)}, "targets.weights must have shape"),
    "targets": ({"logit_targets": [("a", 1)]}, "logit_targets must be LogitTargets"),
    "target_text": ({"logit_targets": [LogitTarget(3, 1), LogitTarget("a", 2)]}, "must be a string"),  # type: ignore[arg-type]
    "target_id": ({"logit_targets": [LogitTarget("a", "b")] * 2}, "vocab_idx must be an int"),  # type: ignore[arg-type]
    "config": ({"cfg": {"n_layers": 2}}, "cfg must be a configuration"),
    "layers": ({"cfg": UnifiedConfig(n_layers="two")}, "n_layers must be an int"),  # type: ignore[arg-type]
    "list": ({"input_tokens": [2, 9]}, "input_tokens must be a plain tensor, got list"),
    "scan": ({"scan": {"a": 1}}, "scan must be a string or a list of strings, got dict"),
    "scans": ({"scan": ["a", ["b"]]}, "scan must be a string or a list of strings, got list"),
    "prompt": ({"input_string": 3}, "prompt must be a string"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_files(tmp_path: Path, bad: str) -> None:
    changes, said = BAD[bad]
    with pytest.raises(GraphFileError, match=rf"Graph\.from_circuit_tracer: .*g\.pt must hold a sound graph.*{said}"):
        Graph.from_circuit_tracer(saved(tmp_path / "g.pt", **changes))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "g.pt"
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        Graph.from_circuit_tracer(path)
    for data in (b"", b"PK\3\4", b"\x80\x02}.", os.urandom(200)):
        path.write_bytes(data)
        with pytest.raises(GraphFileError, match=r"must be a whole archive as torch\.save writes it"):
            Graph.from_circuit_tracer(path)
    torch.save([1], path)
    with pytest.raises(GraphFileError, match="must hold names and values, got list"):
        Graph.from_circuit_tracer(path)


def repacked(path: Path, change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as old:
        members = [(m.filename, old.read(m)) for m in old.infolist()]
    with zipfile.ZipFile(path, "w", how) as new:
        for name, data in members:
            new.writestr(name, change(name, data))


def test_compressed_tensors_and_short_ones(tmp_path: Path) -> None:
    """A bomb would be compressed; a tensor's bytes must be there."""
    path = saved(tmp_path / "g.pt")
    repacked(path, lambda name, data: data)
    assert Graph.from_circuit_tracer(path).rows.entries == 8
    repacked(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(GraphFileError, match=r"must hold its tensors as they are, got .* compressed"):
        Graph.from_circuit_tracer(path)
    for name in ("data/0", "data/3"):
        for left in (0, 5):
            saved(path)
            repacked(path, lambda n, data, name=name, left=left: data[:left] if n.endswith(name) else data)
            with pytest.raises(GraphFileError, match=r"must lie in the file whole, got [05] bytes"):
                Graph.from_circuit_tracer(path)


def test_damaged_bytes_never_give_another_error(tmp_path: Path) -> None:
    """Nor other numbers."""
    whole, path, refused = saved(tmp_path / "g.pt").read_bytes(), tmp_path / "bad.pt", 0
    expected = Graph.from_circuit_tracer(tmp_path / "g.pt")
    for at in range(0, len(whole), 31):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            got = Graph.from_circuit_tracer(path)
        except GraphFileError as error:
            assert "bad.pt" in str(error)
            refused += 1
            continue
        assert torch.equal(got.dense(), expected.dense()) and torch.equal(got.features, expected.features)
    for at in range(0, len(whole), 211):
        path.write_bytes(whole[:at])
        with pytest.raises(GraphFileError):
            Graph.from_circuit_tracer(path)
    assert refused > 10


def test_written_for_them(tmp_path: Path) -> None:
    """With their classes as pickle finds them, as their own from_pt opens it."""
    graph = random_graph(targets=3)
    last = torch.full((3,), graph.positions - 1)
    graph = replace(graph, targets=replace(graph.targets, ids=torch.tensor([40, -1, 42]), positions=last))
    graph.to_circuit_tracer(tmp_path / "g.pt", tokenizer_name="org/t")
    held = torch.load(tmp_path / "g.pt", weights_only=False)
    assert list(held) == list(content())
    assert type(held["cfg"]) is UnifiedConfig and type(held["logit_targets"][0]) is LogitTarget
    assert (held["cfg"].n_layers, held["cfg"].d_vocab, held["cfg"].tokenizer_name) == (4, 100, "org/t")
    assert held["logit_targets"] == [(" t0", 40), (" t1", 101), (" t2", 42)]
    assert torch.equal(held["active_features"], graph.features) and held["scan"] == "set"
    chosen = held["selected_features"]
    assert 0 < len(chosen) < len(graph.features)
    nodes = torch.cat([chosen, torch.arange(graph.first_error, graph.nodes)])
    assert torch.equal(held["adjacency_matrix"], graph.dense()[nodes][:, nodes])


def without_others(graph: Graph) -> Tensor:
    """Edges that a file of theirs has: from features that were selected, errors and tokens."""
    dense = graph.dense()
    out = torch.zeros(graph.nodes, dtype=torch.bool)
    out[graph.row_node] = True
    out[graph.first_error :] = True
    dense[:, ~out] = 0
    return dense


@pytest.mark.parametrize("seed", range(3))
def test_there_and_back(tmp_path: Path, seed: int) -> None:
    graph = random_graph(count=40, seed=seed)
    graph.to_circuit_tracer(tmp_path / "a.pt")
    again = Graph.from_circuit_tracer(tmp_path / "a.pt")
    assert torch.equal(again.features, graph.features) and torch.equal(again.values, graph.values)
    assert torch.equal(again.dense(), without_others(graph))
    assert again.targets.labels == graph.targets.labels and torch.equal(again.targets.ids, graph.targets.ids)
    again.to_circuit_tracer(tmp_path / "b.pt")
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=False) for n in "ab")
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name], name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    graph = by_hand()
    with pytest.raises(TypeError, match=r"Graph\.to_circuit_tracer: scan must be a string, got int"):
        graph.to_circuit_tracer(tmp_path / "g.pt", scan=3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"Graph\.to_circuit_tracer: path must be in a folder that exists"):
        graph.to_circuit_tracer(tmp_path / "no" / "g.pt")
    early = random_graph(positions=3)
    targets = Targets(early.targets.labels, early.targets.ids, early.targets.weights, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"targets must be at the last position, 2, as .* got \[1, 2\]"):
        replace(early, targets=targets).to_circuit_tracer(tmp_path / "g.pt")
    assert list(tmp_path.iterdir()) == [] and isinstance(graph.rows, Rows)
