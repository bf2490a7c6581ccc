"""Decoders left in their files: rows that are read once, and their cache."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from format_files import ROWS, write
from random_transcoders import LAYERS, WIDTH, random_set
from transcoder_checks import assert_same_graph

import pycircuit as pc
from pycircuit.files.reading import read_into
from pycircuit.transcoders import lazy as lazy_rows
from pycircuit.transcoders.formats import stored_tensors
from pycircuit.transcoders.lazy import LazyRows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(file, bytes) of every read of decoder rows."""
    calls: list[tuple[str, int]] = []

    def spy(file: int, buffers: list[memoryview], offset: int, path: Path) -> None:
        calls.append((path.name, sum(map(len, buffers))))
        read_into(file, buffers, offset, path)

    monkeypatch.setattr(lazy_rows, "read_into", spy)
    return calls


@pytest.mark.parametrize(
    "name", ["circuit_tracer", "circuit_tracer_cross", "gemma_scope_2_cross", "llamascopium_cross"]
)
def test_each_active_row_is_read_once(tmp_path: Path, reads: list[tuple[str, int]], name: str) -> None:
    """A complete graph, forward and a sweep of many tiles, reads no row twice."""
    t = write(name, tmp_path / "set")
    model = pc.ReplacementModel(builders.build("llama"), pc.transcoders.load(tmp_path / "set"))
    reads.clear()
    graph = pc.attribute(model, builders.prompt(9), max_features=40, round_size=10, labels=False, progress=False)
    used = torch.unique(graph.features[:, [0, 2]], dim=0)
    slots = [LAYERS - int(layer) if ROWS[name].holds["cross"] else 1 for layer in used[:, 0]]
    assert graph.rows.count > 30 and sum(size for _, size in reads) == sum(slots) * WIDTH * 4
    assert t.depth == LAYERS


def test_rows_are_read_again_above_the_cache(tmp_path: Path, reads: list[tuple[str, int]]) -> None:
    expected = write("circuit_tracer_cross", tmp_path / "set")
    got = pc.transcoders.load(tmp_path / "set", cache=0)
    assert_same_graph(got, expected)
    many = len(reads)
    reads.clear()
    assert_same_graph(pc.transcoders.load(tmp_path / "set", cache="1 MiB"), expected)
    assert many > 3 * len(reads) > 0
    for bad in ("1 furlong", -1, True):
        with pytest.raises(ValueError, match=r"load: cache must be bytes or a size such as '8GiB'"):
            pc.transcoders.load(tmp_path / "set", cache=bad)


def test_the_cache_is_bounded_and_forgets(tmp_path: Path) -> None:
    expected = write("circuit_tracer_cross", tmp_path / "set")
    got = pc.transcoders.load(tmp_path / "set", cache=3000)
    cache = got.w_dec[0].cache
    assert all(w.cache is cache for w in got.w_dec)
    row = LAYERS * WIDTH * 4
    prompts = [pc.SparseFeatures(torch.tensor([0, 2]), torch.tensor([n, n + 3]), torch.ones(2)) for n in range(9)]
    for f in prompts:
        assert torch.equal(pc.ops.decode(f, got.w_dec[0]), pc.ops.decode(f, expected.w_dec[0]))
        assert cache.size <= 3000
    assert cache.size == 3000 // (2 * row) * 2 * row > 0
    del prompts, f
    assert cache.size == 0


def test_the_cache_sees_that_features_were_written_to(tmp_path: Path) -> None:
    expected = write("circuit_tracer_cross", tmp_path / "set")
    got = pc.transcoders.load(tmp_path / "set")
    f = pc.SparseFeatures(torch.tensor([0, 2]), torch.tensor([1, 3]), torch.ones(2))
    for _ in range(2):
        assert torch.equal(pc.ops.decode(f, got.w_dec[0]), pc.ops.decode(f, expected.w_dec[0]))
        f.index.add_(4)


def test_the_cache_forgets_prompts_that_are_gone(tmp_path: Path) -> None:
    write("circuit_tracer_cross", tmp_path / "set")
    got = pc.transcoders.load(tmp_path / "set")
    count = len(weakref.finalize._registry)
    for n in range(9):
        pc.ops.decode(pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([n]), torch.ones(1)), got.w_dec[0])
    assert len(weakref.finalize._registry) <= count + 1
    cache, features = got.w_dec[0].cache, pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([2]), torch.ones(1))
    pc.ops.decode(features, got.w_dec[0])
    assert cache.size > 0
    del got
    gc.collect()
    assert cache.size == 0


def test_cached_rows_leave_nothing_behind(tmp_path: Path) -> None:
    pc.transcoders.save(random_set(False), tmp_path / "set")
    rows = pc.transcoders.load(tmp_path / "set").w_dec[0]
    before = len(weakref.finalize._registry)  # type: ignore[attr-defined]
    for n in range(20):
        pc.ops.decode(pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([n]), torch.ones(1)), rows)
    assert len(weakref.finalize._registry) == before  # type: ignore[attr-defined]
    cache, index = rows.cache, torch.tensor([3])
    rows.gather(pc.SparseFeatures(torch.tensor([0, 1]), index, torch.ones(1)))
    assert cache.size > 0
    del rows
    assert cache.size == 0


@pytest.mark.parametrize("cache", ["1 GiB", 15_000, 0])
def test_the_estimate_counts_rows_left_in_files(tmp_path: Path, cache: Any) -> None:
    """Bytes that a trace keeps; where rows are read again, those of the widest layer beside the cache."""
    write("circuit_tracer_cross", tmp_path / "set")
    transcoders = pc.transcoders.load(tmp_path / "set", cache=cache)
    model, ids = pc.ReplacementModel(builders.build("llama"), transcoders), builders.prompt(9)
    estimated = pc.estimate(model, ids, max_features=5).plan.needs["decoder rows"]
    row_cache = transcoders.w_dec[0].cache
    local = model.freeze(ids)
    sizes = [len(f.index.unique()) * (LAYERS - layer) * WIDTH * 4 for layer, f in enumerate(local.features)]
    assert sum(sizes) > 15_000
    if cache == "1 GiB":
        assert estimated == row_cache.size == sum(sizes)
    else:
        assert row_cache.size <= cache and estimated == cache + max(sizes)
    plain = pc.ReplacementModel(builders.build("llama"), pc.transcoders.load(tmp_path / "set", lazy=False))
    less = pc.estimate(plain, ids, max_features=5)
    assert "decoder rows" not in less.plan.needs
    with pytest.raises(MemoryError, match="attribute: memory must be at least"):
        pc.attribute(model, ids, max_features=5, memory=1000, progress=False)


def test_threads_share_rows(tmp_path: Path) -> None:
    expected = write("gemma_scope_2_cross", tmp_path / "set")
    got = pc.transcoders.load(tmp_path / "set", cache=20_000)
    features = [
        pc.SparseFeatures(torch.tensor([0, 3]), torch.tensor([n, n + 2, n + 5]), torch.ones(3)) for n in range(16)
    ]
    right = [pc.ops.decode(f, expected.w_dec[0]) for f in features]
    with ThreadPoolExecutor(8) as pool:
        for n, out in enumerate(pool.map(lambda f: pc.ops.decode(f, got.w_dec[0]), features * 20)):
            assert torch.equal(out, right[n % 16])


@pytest.mark.parametrize("stacked", [False, True], ids=["one", "planes"])
def test_many_rows_are_read_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stacked: bool) -> None:
    """Rows next to each other, far apart, more than one call may take, at odd offsets."""
    monkeypatch.setattr(lazy_rows, "_PARALLEL", 1000)
    w = torch.randn(3, 5000, 7, generator=torch.Generator().manual_seed(0))
    (tmp_path / "raw").write_bytes(b"abc" + w.numpy().tobytes())
    stored = stored_tensors.StoredTensor.packed(tmp_path / "raw", "w", 3, tuple(w.shape), torch.float32)
    planes = [stored.entry(n) for n in range(3)]
    rows = LazyRows.of(planes if stacked else planes[1:2], stacked, None, lazy_rows.RowCache(0))
    used = torch.cat([torch.arange(3), torch.arange(100, 3000), torch.arange(3001, 5000, 7)])
    assert torch.equal(rows.rows(used), w[:, used].transpose(0, 1) if stacked else w[1, used])
    assert rows.rows(used[:0]).shape == (0, *rows.shape[1:])


def test_rows_by_index(tmp_path: Path) -> None:
    """Rows come in any order and more than once, as of a tensor."""
    t = write("llamascopium_cross", tmp_path / "set")
    got, index = pc.transcoders.load(tmp_path / "set"), torch.tensor([5, 2, 5, 0])
    assert torch.equal(got.w_dec[1][index], t.w_dec[1][index])
    assert torch.equal(got.decoder(1, 2)[index], t.decoder(1, 2)[index])
    assert got.decoder(0, 2).shape == t.decoder(0, 2).shape
    with pytest.raises(ValueError, match=r"must be one of 2 slots, got 2"):
        got.w_dec[1].slot(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_finite(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The largest numbers are; NaN and infinities of either sign are not, wherever they are."""
    monkeypatch.setattr(lazy_rows, "_CHECKED", 8)
    limits = torch.finfo(dtype)
    t = torch.tensor([limits.max, limits.min, limits.tiny, -0.0, 1.0] * 6, dtype=dtype).view(10, 3)
    for finite in (t, t[:, :2], t[::2], t.flatten(), t[0, 0], t[:0]):
        assert lazy_rows.is_finite(finite)
    for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        for index in (0, 7, 29):
            damaged = t.clone().flatten()
            damaged[index] = bad
            assert not lazy_rows.is_finite(damaged) and not lazy_rows.is_finite(damaged.view(10, 3))


def test_a_file_that_shrinks_is_seen(tmp_path: Path) -> None:
    write("circuit_tracer", tmp_path / "set")
    got = pc.transcoders.load(tmp_path / "set")
    path = tmp_path / "set" / "layer_0.safetensors"
    with path.open("r+b") as file:
        file.truncate(got.w_dec[0].offset + 10)
    features = pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([3]), torch.ones(1))
    with pytest.raises(ValueError, match=r"layer_0\.safetensors must not change while in use, got 442 bytes"):
        pc.ops.decode(features, got.w_dec[0])


MEASURE_MEMORY = """
import sys, builders, pycircuit as pc
def own():
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("RssAnon"))
hf_model = builders.build("llama")
for lazy in (True, False):
    before = own()
    model = pc.ReplacementModel(hf_model, pc.transcoders.load(sys.argv[1], lazy=lazy))
    graph = pc.attribute(model, builders.prompt(9), max_features=20, labels=False, progress=False)
    print(own() - before, len(graph.features))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to see a process's memory")
def test_memory_of_a_graph(tmp_path: Path) -> None:
    """Memory beside pages of the files, which the system may drop: of 70 MB of them, next to nothing."""
    g, size = torch.Generator().manual_seed(0), 60_000
    w_enc = [torch.randn(size, WIDTH, generator=g) / WIDTH**0.5 for _ in range(LAYERS)]
    w_dec = [torch.zeros(size, LAYERS - n, WIDTH) for n in range(LAYERS)]
    every = [torch.zeros(size)] * LAYERS
    pc.transcoders.save(pc.CrossLayerTranscoder(w_enc, every, w_dec, activation=pc.TopK(20)), tmp_path / "set")
    file_bytes = sum(p.stat().st_size for p in (tmp_path / "set").iterdir())
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", MEASURE_MEMORY, str(tmp_path / "set")]
    out = subprocess.run(words, capture_output=True, text=True, env=path, check=True).stdout.splitlines()
    (lazy, features), (memory, same_features) = (map(int, line.split()) for line in out)
    assert features == same_features == LAYERS * 8 * 20
    assert lazy < 0.25 * file_bytes < 0.9 * file_bytes < memory
