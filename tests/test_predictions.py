"""benchmarks/PREDICTIONS.md is what its function writes, and counts what the benchmarks count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pycircuit.bench import cone
from pycircuit.bench.shapes import SHAPES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def predictions(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import predictions as module

    return module


def test_the_document_is_written_by_its_function(predictions: Any) -> None:
    """`python benchmarks/predictions.py` writes it again."""
    assert predictions.PATH.read_text() == predictions.document()
    assert "Nothing here was measured on a GPU" in predictions.document()


def test_kernels_count_as_the_benchmark_does(predictions: Any) -> None:
    from gpu_shapes import TINY, items

    counted = {(op, item.operations): item.bytes for op in predictions.SHARES for item in items(op, "cpu")}
    works = list(predictions.kernels(TINY))
    assert {work.name for work in works} == set(predictions.SHARES)
    for work in works:
        assert (work.name, work.operations) in counted, work
        sizes = [item.bytes for item in items(work.name, "cpu") if item.operations == work.operations]
        assert min(abs(size - work.bytes) / size for size in sizes) < 0.1, work


@pytest.mark.parametrize("name", ["gemma2b", "gemma2b-clt", "gemma2b-ten"])
def test_a_sweep_counts_its_cones(predictions: Any, name: str) -> None:
    shape = SHAPES[name]
    layer, position = predictions.grid(shape)
    total = sum(work.operations for work in predictions.sweep(shape, layer, position))
    assert total == pytest.approx(cone.operations(shape, layer, position), rel=1e-12)


def test_faster_products_take_less(predictions: Any) -> None:
    for shape in predictions.gpu_shapes():
        times = [predictions.seconds(shape, rate) for rate in ("fp32", "bf16x6", "bf16x3", "tf32")]
        assert times == sorted(times, reverse=True) and times[-1] > 0
    half = replace(SHAPES["gemma2b"], targets=3_750)
    operations = {work.name: work.operations for work in predictions.trace(SHAPES["gemma2b"])}
    assert next(w.operations for w in predictions.trace(half) if w.name == "products") == operations["products"] / 2
