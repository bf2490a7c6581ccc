"""The benchmark of transcoders left in their files, on a set that takes no time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pycircuit.transcoders import formats

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to see a process's memory"),
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "lazy.py"
    spec = importlib.util.spec_from_file_location("bench_lazy", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"LAYERS": 3, "WIDTH": 32, "FEATURES": 64, "ACTIVE": 8, "POSITIONS": 6, "ROWS": 4, "ROUNDS": 1,
             "COLD_LAYERS": 2, "COLD_ROWS": 10, "BLOCK": 48}  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_what_is_measured(tmp_path: Path, bench: ModuleType) -> None:
    bench.write(tmp_path)
    held = formats.load(tmp_path)
    assert held.depth == 3 and held.size(0) == 64 and held.w_dec[1].shape == (64, 2, 32)
    found = bench.measure_memory(tmp_path)
    graph = bench.traced(bench.pc.ReplacementModel(bench.language_model(), held))
    assert found["features"] == len(graph.features) > 20
    used = {(layer, feature) for layer, _, feature in graph.features.tolist()}
    assert found["rows"] == sum((3 - layer) * 32 * 2 for layer, _ in used)
    assert 0 <= found["own"] < found["peak"] + (8 << 20)
    lazy, whole, apart = bench.measure_time(tmp_path)
    assert lazy > 0 and whole > 0 and apart < 1e-6
    ours, plain = bench.measure_cold(tmp_path)
    assert ours > 0 and list(plain) == [1, 8, 32] and min(plain.values()) > 0


def test_rates_count_the_bytes_that_are_read(tmp_path: Path, bench: ModuleType) -> None:
    bench.write(tmp_path)
    read: list[int] = []

    def count(layer: int, rows: torch.Tensor) -> int:
        read.append(len(rows))
        return 0

    assert bench.rate(tmp_path, count, 0) == 0 and read == [10, 10]
