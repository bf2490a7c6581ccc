"""Tests of CSR rows: compression, trusted rows, order of columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from graphs import assemble, random_features, random_graph, random_matrix

from pycircuit.graph import Rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("keep", [0, 1, 5, 1000])
def test_compressed_rows_keep_the_law(keep: int) -> None:
    features = random_features(30, 4, 3, 2)
    matrix = random_matrix(features, 4, 3, 2, 0.7, 2)
    original = assemble(matrix, features, 4, 3, [0.6, 0.3])
    rows, dropped, mass = Rows.from_dense(matrix[original.row_node], keep)
    graph = replace(original, rows=rows, dropped=dropped, dropped_mass=mass)
    assert graph.certificate < 1e-15
    assert int(rows.lengths().max()) <= keep
    left = matrix[original.row_node].abs().sum(1) - torch.from_numpy(rows.sums(rows.magnitudes()))
    assert torch.allclose(mass, left, atol=1e-12)
    if keep < 5:
        assert replace(graph, dropped=None).certificate > 1e-3


def test_compression_keeps_lower_columns_among_equals() -> None:
    rows, dropped, mass = Rows.from_dense(torch.tensor([[1.0, -2.0, 1.0, 2.0, 1.0, 0.0]]), 3)
    assert rows.column.tolist() == [0, 1, 3]
    assert (dropped.tolist(), mass.tolist()) == ([2.0], [2.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("keep", [None, 0, 1, 3, 17, 29, 30, 31])
def test_from_dense_equals_a_sort(keep: int | None, dtype: type) -> None:
    """Many equal sizes, zeros, an empty and a full row; strided, too."""
    drawn = np.random.default_rng(5).integers(-4, 5, (40, 30)).astype(dtype)
    drawn[3], drawn[4] = 0, 2
    for matrix in (drawn, np.asfortranarray(drawn), np.repeat(drawn, 2, 1)[:, ::2]):
        rows, dropped, mass = Rows.from_dense(matrix, keep)
        assert rows.weight.numpy().dtype == dtype
        for r, row in enumerate(drawn):
            order = sorted(np.flatnonzero(row).tolist(), key=lambda c: (-abs(row[c]), c))
            columns = sorted(order[:keep])
            column, weight = rows.row(r)
            assert column.tolist() == columns
            assert weight.tolist() == row[columns].tolist()
            left = row[order[len(columns) :]].astype(np.float64)
            assert (float(dropped[r]), float(mass[r])) == (left.sum(), np.abs(left).sum())


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_compression_hides_no_nan(keep: int | None) -> None:
    rows, dropped, mass = Rows.from_dense(torch.tensor([[1.0, torch.nan, 3.0, torch.nan]]), keep)
    assert np.isnan(rows.masses()[0] + float(dropped[0]) + float(mass[0]))


def test_trusted_rows_are_taken_as_they_are() -> None:
    """Nothing is copied or looked at, and a graph still refuses what would make its numbers wrong."""
    graph = random_graph()
    parts = (graph.rows.row_ptr, graph.rows.column, graph.rows.weight)
    rows = Rows.trusted(*parts)
    assert all(a is b for a, b in zip(parts, (rows.row_ptr, rows.column, rows.weight), strict=True))
    again = replace(graph, rows=rows)
    assert again.rows is rows
    assert torch.equal(again.dense(), graph.dense())
    for weight, column, message in (
        (parts[2] * torch.inf, parts[1], "rows.weight must be finite"),
        (parts[2], parts[1] + graph.nodes, "rows.column must be"),
        (parts[2], parts[1] - graph.nodes, "rows.column must be"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(graph, rows=Rows.trusted(parts[0], column, weight))


@pytest.mark.parametrize("entry", [1, 65_535, 65_536, 65_537, 131_071, 131_072, 149_999])
def test_one_fall_anywhere_is_found(entry: int) -> None:
    column = torch.arange(150_000)
    column[entry] = column[entry - 1]
    with pytest.raises(ValueError, match=f"must ascend within each row, got {entry - 1} after {entry - 1} at {entry}"):
        Rows(torch.tensor([0, 150_000]), column, torch.ones(150_000))
    column = torch.arange(150_000)
    column[entry:] -= entry
    assert Rows(torch.tensor([0, entry, entry, 150_000]), column, torch.ones(150_000)).count == 3
    with pytest.raises(ValueError, match="must ascend"):
        Rows(torch.tensor([0, entry - 1, 150_000]), column, torch.ones(150_000))
