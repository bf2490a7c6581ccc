"""Benchmark of complete traces: its counts, its checks and its section of the results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pycircuit as pc
from pycircuit.bench import cone, memory, models, sections, whole_trace
from pycircuit.bench.shapes import SHAPES, Shape

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Shape("tiny", 3, 32, 4, 2, 8, 128, 6, 12, 20, "cpu")


@pytest.fixture(scope="module")
def graph() -> pc.Graph:
    return pc.attribute(models.replacement(TINY), models.prompt(TINY.positions), max_features=TINY.targets)


def by_hand(shape: Shape, layer: int, position: int, fewest: bool) -> int:
    """Operations of a target, counted one multiply and add at a time down the layers."""
    ops, n = 0, position + 1
    crossed = min(layer, shape.layers - 1)  # attentions, past the first
    for below in reversed(range(shape.layers)):
        if below < layer:  # its MLP writes below the target's read
            ops += 2 * n * (shape.active * (below + 1 if shape.cross_layer else 1) + 1) * shape.width
        if below >= crossed:
            continue
        joins, ends = fewest and below == crossed - 1, fewest and below == 0
        into_heads = shape.heads if joins else shape.width  # a row is the sum of so many vectors, or is projected
        out_of_heads = 1 if ends else shape.width  # a score against a token's values, or a projection
        ops += 2 * n * into_heads * shape.head_width * shape.heads
        ops += sum(2 * (i + 1) * shape.head_width for _ in range(shape.heads) for i in range(n))
        ops += 2 * n * out_of_heads * shape.head_width * shape.kv_heads
        ops += 2 * n * shape.heads * shape.width if joins else 0  # the rows themselves, for scores and the sum
    return ops + 2 * n * shape.width


@pytest.mark.parametrize("cross_layer", [False, True])
@pytest.mark.parametrize("fewest", [False, True])
def test_operations_of_the_cone(graph: pc.Graph, fewest: bool, cross_layer: bool) -> None:
    shape = replace(TINY, cross_layer=cross_layer)
    layer, position = cone.expanded(graph)
    assert layer.tolist().count(TINY.layers) == len(graph.targets) and len(layer) == graph.rows.count
    assert position[layer == TINY.layers].unique().tolist() == [TINY.positions - 1]
    expected = sum(by_hand(shape, *target, fewest) for target in zip(layer.tolist(), position.tolist(), strict=True))
    count = cone.fewest if fewest else cone.operations
    assert count(shape, layer, position) == expected


def test_a_shape_has_its_active_features(graph: pc.Graph) -> None:
    positions = TINY.positions - 1  # none at the first
    assert len(graph.features) / (positions * TINY.layers) == pytest.approx(TINY.active, rel=0.25)
    assert graph.certificate < whole_trace.LAW


def test_a_cross_layer_shape_has_bfloat16_decoders() -> None:
    shape = replace(TINY, cross_layer=True, decoders="bfloat16")
    model = models.replacement(shape)
    assert [tuple(w.shape) for w in model.transcoders.w_dec] == [(128, 3, 32), (128, 2, 32), (128, 1, 32)]
    assert {w.dtype for w in model.transcoders.w_dec} == {torch.bfloat16}
    graph = pc.attribute(model, models.prompt(shape.positions), max_features=shape.targets)
    assert len(graph.features) / (11 * shape.layers) == pytest.approx(shape.active, rel=0.25)
    assert graph.certificate < whole_trace.LAW


def test_a_model_takes_its_shapes_prompt() -> None:
    for shape in SHAPES.values():
        size = replace(TINY, positions=shape.positions)
        assert models.language_model(size).config.max_position_embeddings >= shape.positions


def test_native_and_reference_are_timed_by_phase() -> None:
    native, *precisions, reference = whole_trace.compare(TINY, runs=3)
    assert [traced.what for traced in precisions] == whole_trace.in_parts()
    for traced in precisions:
        assert len(traced.times) == 3 and whole_trace.shares_of(traced, 1e9) == "- / -"
    assert (native.what, reference.what) == ("native", "reference")
    for traced in (native, reference):
        assert len(traced.times) == 3 and traced.certificate is not None and traced.certificate < whole_trace.LAW
        assert sum(traced.timings.values()) <= max(traced.times) and sum(traced.shares().values()) == pytest.approx(1)
    assert native.rows == reference.rows and native.operations == reference.operations > 0
    text = whole_trace.markdown([native, reference], 1e9)
    assert f"| {reference.median / native.median:.2f} |" in text and "| 1.00 |" in text
    assert native.fewest < native.operations and "REFUSED" not in text


def test_a_sweep_above_the_matrix_rate_is_not_printed() -> None:
    """Half of the operations are needed: at 100% of the rate they stand, above it the rate would be wrong."""
    traced = whole_trace.Traced("tiny", "native", 1, timings={"sweep": 1.0}, operations=2e9, fewest=1e9)
    assert whole_trace.shares_of(traced, 1e9) == "200% / 100%"
    assert whole_trace.shares_of(traced, 9e8).startswith("REFUSED: 111% of 1 GFLOP/s")


def test_the_phases_kept_are_the_median_runs() -> None:
    traced = whole_trace.Traced("tiny", "native", 1)
    for seconds in (3.0, 1.0, 2.0):
        traced.add(seconds, {"sweep": seconds / 2})
    assert traced.median == 2.0 and traced.timings == {"sweep": 1.0}


def test_rows_that_differ_are_seen(graph: pc.Graph) -> None:
    assert whole_trace.off(graph, graph) == 0
    weight = graph.rows.weight.clone()
    weight[0] *= 1.5
    assert (
        whole_trace.off(graph, replace(graph, rows=type(graph.rows)(graph.rows.row_ptr, graph.rows.column, weight)))
        > 1e-4
    )
    less = pc.attribute(models.replacement(TINY), models.prompt(TINY.positions), max_features=TINY.targets - 1)
    assert whole_trace.off(graph, less) == float("inf")


def test_the_peak_is_counted_from_the_restart() -> None:
    base = memory.restart_peak()
    if base is None:
        pytest.skip("needs /proc")
    allocated = torch.ones(16 << 20)
    assert (memory.peak() or 0) - base >= allocated.nbytes
    size = allocated.nbytes
    del allocated
    again = memory.restart_peak()
    assert again is not None and (memory.peak() or 0) - again < size / 2


def test_writers_keep_each_others_sections(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results of before\n")
    sections.put(path, "peers", "# Peers\n| a |\n")
    assert sections.read(path) == {"ops": "# Results of before\n", "peers": "# Peers\n| a |\n"}
    sections.put(path, "ops", "# Results\n")
    sections.put(path, "peers", "# Peers again\n\n\n")
    assert sections.read(path) == {"ops": "# Results\n", "peers": "# Peers again\n"}
    text = path.read_text()
    assert text.index("# Results") < text.index("# Peers again") and "before" not in text
    known = "ops, trace, growth, train, lazy, peers, gpu"
    with pytest.raises(ValueError, match=f"section must be one of {known}, got 'other'"):
        sections.put(path, "other", "")
