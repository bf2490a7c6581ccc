"""Decoder rows left in a file: strict about the file, equal to rows in memory, and only active rows are read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pycircuit as pc
from pycircuit.files.reading import read_into
from pycircuit.ops import FileRows, cases, file_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _entry(begin: int, end: int, shape: tuple[int, ...] = (2, 2), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 12), (40, 3, 12), (40, 1)])
def test_decode_equals_memory(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = cases.generator(5)
    w_dec, bias = cases.normal(g, *shape, dtype=dtype), cases.normal(g, *shape[1:])
    save_file({"other": torch.ones(3), "w_dec": w_dec, "z": torch.ones(5)}, tmp_path / "w.safetensors")
    features = cases.sparse(g, 9, 40, 6)
    rows = FileRows.safetensors(tmp_path / "w.safetensors", "w_dec")
    assert rows.shape == shape and rows.stored == dtype
    got = pc.ops.decode(features, rows, bias)
    assert pc.last_run() == pc.ops.Ran("decode", "native", pc.explain("decode").isa)
    assert torch.equal(got, pc.ops.decode(features, w_dec.to(rows.dtype), bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["native", "reference"])
def test_edge_scores_equals_memory(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    gradient, ptr, features, w_dec, out = cases.CASES["edge_scores"]["ragged"](cases.generator(2))
    w_dec = w_dec.to(dtype).contiguous()
    (tmp_path / "raw").write_bytes(b"abc" + w_dec.view(torch.uint8).numpy().tobytes())  # odd offset: nothing is aligned
    rows = FileRows(tmp_path / "raw", 3, tuple(w_dec.shape), dtype)
    with pc.use(form):
        expected = pc.ops.edge_scores(gradient, ptr, features, w_dec.to(rows.dtype), out.clone())
        got = pc.ops.edge_scores(gradient, ptr, features, rows, out)
    assert torch.equal(got, expected)


def test_each_row_is_read_once_in_file_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w_dec = torch.arange(50.0).view(10, 5)
    (tmp_path / "raw").write_bytes(w_dec.numpy().tobytes())
    reads: list[tuple[int, int]] = []

    def spy(file: int, buffers: list[memoryview], offset: int, *names: Any) -> None:
        reads.append((offset // 20, len(buffers[0]) // 20))
        read_into(file, buffers, offset, *names)

    monkeypatch.setattr(file_rows, "read_into", spy)
    ptr, index = torch.tensor([0, 3, 6]), torch.tensor([2, 3, 9, 0, 3, 4])
    features = pc.SparseFeatures(ptr, index, torch.ones(6))
    compact, rows = FileRows(tmp_path / "raw", 0, (10, 5), torch.float32).gather(features)
    assert reads == [(0, 1), (2, 3), (9, 1)]  # (first row, how many)
    assert torch.equal(rows, w_dec[[0, 2, 3, 4, 9]])
    assert compact.index.tolist() == [1, 2, 4, 0, 2, 3]


def test_nothing_active(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(40))
    features = pc.SparseFeatures(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    got = pc.ops.decode(features, FileRows(tmp_path / "raw", 0, (2, 5), torch.float32), torch.arange(5.0))
    assert torch.equal(got, torch.arange(5.0).expand(3, 5))


BAD: dict[str, tuple[Any, bytes, str]] = {
    "not_json": (b"{broken", b"", "header of JSON"),
    "not_text": (b"\xff\xfe", b"", "header of JSON"),
    "deep": (b"[" * 100_000, b"", "header of JSON"),
    "not_an_object": (b"[1]", b"", "JSON object"),
    "twice": (b'{"w": 1, "w": 2}', b"", "a name twice"),
    "no_shape": ({"w": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16), "shape and data_offsets"),
    "not_an_entry": ({"w": 3}, bytes(16), "shape and data_offsets"),
    "float_shape": ({"w": _entry(0, 16) | {"shape": [2.0, 2]}}, bytes(16), "shape and data_offsets"),
    "bool_shape": ({"w": _entry(0, 16) | {"shape": [True, 4]}}, bytes(16), "shape and data_offsets"),
    "negative": ({"w": _entry(-16, 0)}, bytes(16), "shape and data_offsets"),
    "backwards": ({"w": _entry(16, 0)}, bytes(16), "16 bytes, got"),
    "three_offsets": ({"w": _entry(0, 16) | {"data_offsets": [0, 8, 16]}}, bytes(16), "got data_offsets"),
    "wrong_bytes": ({"w": _entry(0, 12)}, bytes(12), "must give w 16 bytes"),
    "overlap": ({"w": _entry(0, 16), "v": _entry(8, 24)}, bytes(24), "end to end"),
    "gap": ({"w": _entry(0, 16), "v": _entry(20, 36)}, bytes(36), "end to end"),
    "truncated": ({"w": _entry(0, 16)}, bytes(15), "truncated"),
    "too_long": ({"w": _entry(0, 16)}, bytes(17), "truncated"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_files(tmp_path: Path, bad: str) -> None:
    header, data, match = BAD[bad]
    with pytest.raises(ValueError, match=rf"FileRows: .*{match}") as caught:
        FileRows.safetensors(_write(tmp_path / "w.safetensors", header, data), "w")
    assert ", got " in str(caught.value)


@pytest.mark.parametrize("size", range(8))
def test_shorter_than_the_length_of_its_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "w").write_bytes(bytes(size))
    with pytest.raises(ValueError, match="must hold its header"):
        FileRows.safetensors(tmp_path / "w", "w")


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold its header, got 9223372036854775808 bytes"):
        FileRows.safetensors(_write(tmp_path / "w", {}, length=2**63), "w")


def test_wrong_name_type_and_shape(tmp_path: Path) -> None:
    path = _write(tmp_path / "w", {"__metadata__": {"a": "b"}, "w": _entry(0, 8, (2, 2), "I16")}, bytes(8))
    with pytest.raises(KeyError, match=r"name must be a tensor of .* \(w\), got 'v'"):
        FileRows.safetensors(path, "v")
    with pytest.raises(TypeError, match="w must be one of F32, BF16, F16, got I16"):
        FileRows.safetensors(path, "w")
    with pytest.raises(ValueError, match=r"2 or 3 dimensions, got \[8\]"):
        FileRows(path, 0, (8,), torch.float32)
    with pytest.raises(TypeError, match=r"stored must be float32, bfloat16 or float16, got torch.float64"):
        FileRows(path, 0, (1, 1), torch.float64)
    with pytest.raises(ValueError, match="must hold 4000 bytes from 0 on, got a file of"):
        FileRows(path, 0, (10, 100), torch.float32)
    with pytest.raises(FileNotFoundError):
        FileRows.safetensors(tmp_path / "missing", "w")


def test_file_cut_while_in_use(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(400))
    rows = FileRows(path, 0, (10, 10), torch.float32)
    path.write_bytes(bytes(380))
    features = pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([9]), torch.ones(1))
    with pytest.raises(ValueError, match="must not shrink while in use, got its end at byte 380"):
        pc.ops.decode(features, rows)


RESIDENT = """
import sys, torch, pycircuit as pc
path, how, op = sys.argv[1:]
shape = (300_000, 1024)  # 1.2 GB of holes
def resident(key):
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(key))
if how == "file":
    w = pc.ops.FileRows(path, 0, shape, torch.float32)
else:
    w = torch.from_file(path, shared=True, size=shape[0] * shape[1]).view(shape)
index = torch.arange(100, 300_000, 3_000)
few = pc.SparseFeatures(torch.tensor([0, len(index)]), index, torch.ones(len(index)))
def call(f):
    if op == "decode":
        return pc.ops.decode(f, w)
    return pc.ops.edge_scores(torch.ones(1, 1024), torch.tensor([0, 1]), f, w, torch.zeros(1, f.count))
call(pc.SparseFeatures(torch.tensor([0, 1]), index[:1], torch.ones(1)))
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
call(few)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak of memory")
@pytest.mark.parametrize("op", ["decode", "edge_scores"])
@pytest.mark.parametrize("how", ["file", "mapped"])
def test_memory_is_the_active_rows(tmp_path: Path, how: str, op: str) -> None:
    with (tmp_path / "raw").open("wb") as file:
        file.truncate(300_000 * 1024 * 4)
    run = [sys.executable, "-c", RESIDENT, str(tmp_path / "raw"), how, op]
    extra = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    # 100 rows of 4 KB. A fault on a mapping brings in up to 16 pages around it that are already cached.
    assert extra < (16 if how == "mapped" else 1) * 100 * 4096 + (2 << 20)


def _sparse_file(path: Path, rows: int, width: int, at: dict[int, Tensor]) -> Tensor:
    """[rows, width] float32 over a file of holes, with the few rows given."""
    with path.open("wb") as file:
        file.truncate(rows * width * 4)
        for row, values in at.items():
            file.seek(row * width * 4)
            file.write(values.numpy().tobytes())
    return torch.from_file(str(path), shared=True, size=rows * width).view(rows, width)


FAR = (1_100_000, 2048)  # 2.25e9 elements: offsets pass 2^31 after row 1,048,576


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, list[int]]:
    rows = [0, 7, 1_048_575, 1_048_576, 1_048_577, FAR[0] - 1]
    path = tmp_path_factory.mktemp("far") / "w"
    return path, _sparse_file(path, *FAR, {r: torch.randn(FAR[1], generator=cases.generator(r)) for r in rows}), rows


def _isas() -> list[str]:
    from pycircuit.ops.dispatch import native_isas

    return [name for name, supported in native_isas() if supported]


@pytest.mark.parametrize("isa", _isas())
@pytest.mark.parametrize("where", ["mapped", "file", "slots"])
def test_large_index(far: tuple[Path, Tensor, list[int]], isa: str, where: str) -> None:
    path, mapped, rows = far
    near = mapped[rows].clone()
    index, ptr = torch.tensor(rows), torch.tensor([0, 3, 6])
    features = pc.SparseFeatures(ptr, index, torch.tensor([1.0, 2, 3, 4, 5, 6]))
    compact = pc.SparseFeatures(ptr, torch.arange(6), features.value)
    w_dec: Any = FileRows(path, 0, FAR, torch.float32) if where == "file" else mapped
    gradient, prefix = torch.randn(3, FAR[1], generator=cases.generator(1)), cases.prefixes(2, 1)
    with pc.use("native", isa=isa):
        if where == "slots":
            w3 = mapped.view(FAR[0], 2, FAR[1] // 2)
            assert torch.equal(pc.ops.decode(features, w3), pc.ops.decode(compact, near.view(6, 2, -1)))
        else:
            assert torch.equal(pc.ops.decode(features, w_dec), pc.ops.decode(compact, near))
        w2, g2 = (w3[:, 1], gradient[:, :1024]) if where == "slots" else (w_dec, gradient)
        n2 = near[:, 1024:] if where == "slots" else near
        got = pc.ops.edge_scores(g2, prefix, features, w2, torch.zeros(2, 6))
        assert torch.equal(got, pc.ops.edge_scores(g2, prefix, compact, n2, torch.zeros(2, 6)))


@pytest.mark.parametrize("isa", _isas())
def test_large_strides_in_encode(far: tuple[Path, Tensor, list[int]], isa: str) -> None:
    """Rows of x and w_enc so far apart that the third lies past 2^31 elements."""
    base = far[1].view(-1)
    step = 1_048_576 * 1024
    w_enc = base.as_strided((3, 24), (step, 1))
    x = base.as_strided((3, 24), (step, 1))
    assert 2 * step >= 2**31 and bool(w_enc[2].any())
    with pc.use("native", isa=isa):
        for rule in (pc.ReLU(), pc.TopK(2)):
            got = pc.ops.encode(x, w_enc, torch.ones(3), rule)
            close = pc.ops.encode(x.clone(), w_enc.clone(), torch.ones(3), rule)
            assert got.count and torch.equal(got.dense(3), close.dense(3))


@pytest.mark.parametrize("isa", _isas())
def test_large_strides_elsewhere(far: tuple[Path, Tensor, list[int]], isa: str) -> None:
    step = 1_048_576 * 1024
    wide = far[1].view(-1).as_strided((3, 24), (step, 1))
    with pc.use("native", isa=isa):
        features = pc.SparseFeatures(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.ones(2))
        prefix, w_dec = cases.prefixes(1, 1, 1), torch.ones(2, 24)
        got = pc.ops.edge_scores(wide, prefix, features, w_dec, torch.zeros(3, 2))
        assert torch.equal(got, pc.ops.edge_scores(wide.clone(), prefix, features, w_dec, torch.zeros(3, 2)))
        node, weight = torch.full((3,), -1), torch.ones(3)
        close = pc.ops.influence(wide.clone(), node, weight)
        assert torch.equal(pc.ops.influence(wide, node, weight), close)
        order = torch.tensor([2, 0, 1])
        assert torch.equal(pc.ops.influence(wide, node, weight, order), pc.ops.influence(wide[order], node, weight))
