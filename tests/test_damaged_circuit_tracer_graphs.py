"""Tests of hostile, wrong and damaged `.pt` graphs."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from circuit_tracer_files import (
    LAYERS,
    LogitTarget,
    UnifiedConfig,
    content,
    installed_classes,
    repacked,
    saved,
    with_opcodes,
)

from pycircuit.graph import Graph, GraphFileError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def remove_classes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Function that removes the stand-ins for circuit-tracer's classes, which are there until then."""
    with installed_classes(monkeypatch) as remove:
        yield remove


class Hostile:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("form", ["torch", "in_targets", "in_config", "plain", "legacy", "polyglot"])
def test_a_hostile_pickle_is_refused_and_nothing_runs(
    tmp_path: Path, remove_classes: Callable[[], None], form: str
) -> None:
    mark, path = tmp_path / "ran", tmp_path / "g.pt"
    bad = Hostile(os.system, f"touch {mark}")
    if form == "torch":
        saved(path, scan=bad)
    elif form == "in_targets":
        saved(path, logit_targets=[LogitTarget(bad, 3)])  # type: ignore[arg-type]
    elif form == "in_config":
        saved(path, cfg=UnifiedConfig(dtype=Hostile(eval, f"open({str(mark)!r}, 'w')")))
    elif form == "legacy":
        torch.save({**content(), "scan": bad}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps({**content(), "scan": bad}))
    if form == "polyglot":
        with zipfile.ZipFile(path, "a") as archive:  # a pickle that is an archive too
            archive.writestr("g/data.pkl", pickle.dumps(bad, 2))
            archive.writestr("g/version", "3\n")
    remove_classes()
    with pytest.raises(GraphFileError, match=r"Graph\.from_circuit_tracer: .*g\.pt must (hold|be)"):
        Graph.from_circuit_tracer(path)
    assert not mark.exists()
    if form in ("torch", "in_config", "in_targets"):
        with pytest.raises(GraphFileError, match=r"GLOBAL (posix\.system|__builtin__\.eval)"):
            Graph.from_circuit_tracer(path)
        if form == "torch":
            pickle.loads(pickle.dumps(bad))
            assert mark.exists()  # it would have run


def laughs() -> list[Any]:
    """Nothing in a file, and 4**60 words where it is written out."""
    nested: list[Any] = ["ha"]
    for _ in range(60):
        nested = [nested] * 4
    return nested


@pytest.mark.parametrize("name", ["scan", "input_string", "vocab_size", "logit_targets", "cfg", "adjacency_matrix"])
def test_lists_that_explode_where_they_are_written_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(GraphFileError, match="must hold a sound graph") as caught:
        Graph.from_circuit_tracer(saved(tmp_path / "g.pt", **{name: laughs()}))
    assert len(str(caught.value)) < 500
    with pytest.raises(GraphFileError, match="must hold a sound graph"):
        Graph.from_circuit_tracer(with_opcodes(tmp_path / "g.pt", name, b"]" * 100_000 + b"a" * 99_999))


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


@pytest.mark.parametrize("name", OPCODES)
def test_opcodes_that_no_graph_needs(tmp_path: Path, name: str) -> None:
    opcodes, message = OPCODES[name]
    path = with_opcodes(tmp_path / "g.pt", "scan", opcodes)
    with pytest.raises(GraphFileError, match=rf"must hold plain values and tensors, got .*{message}"):
        Graph.from_circuit_tracer(path)
    assert Graph.from_circuit_tracer(saved(path)).layers == LAYERS  # nothing of it stays


def test_values_changed_at_random_never_give_another_error(tmp_path: Path) -> None:
    """Bytes of the pickle changed, opcodes put in and taken out, in an archive that is sound."""
    path, rng, refused = tmp_path / "g.pt", np.random.default_rng(0), 0
    opcodes = [*(bytes([code]) for code in b")]}(tRbsueaN\x81\x85Q"), b"h\5", b"q\5"]

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        for offset in rng.integers(len(data), size=rng.integers(1, 4)).tolist():
            new = opcodes[rng.integers(len(opcodes))] if rng.random() < 0.6 else bytes([rng.integers(256)])
            data = data[:offset] + new + data[offset + rng.integers(3) :]
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
        members, start = len(archive.infolist()), archive.start_dir
    entry = data[start : data.index(b"PK\1\2", start + 4)]
    entries = data[start : start + data[start:].index(b"PK\5\6")].split(b"PK\6\6")[0] + entry * count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, members + count, members + count, len(entries), start, 0)
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
    changes, message = BAD[bad]
    with pytest.raises(
        GraphFileError, match=rf"Graph\.from_circuit_tracer: .*g\.pt must hold a sound graph.*{message}"
    ):
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
    data, path, refused = saved(tmp_path / "g.pt").read_bytes(), tmp_path / "bad.pt", 0
    expected = Graph.from_circuit_tracer(tmp_path / "g.pt")
    for offset in range(0, len(data), 31):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x5A]) + data[offset + 1 :])
        try:
            got = Graph.from_circuit_tracer(path)
        except GraphFileError as error:
            assert "bad.pt" in str(error)
            refused += 1
            continue
        assert torch.equal(got.dense(), expected.dense()) and torch.equal(got.features, expected.features)
    for offset in range(0, len(data), 211):
        path.write_bytes(data[:offset])
        with pytest.raises(GraphFileError):
            Graph.from_circuit_tracer(path)
    assert refused > 10
