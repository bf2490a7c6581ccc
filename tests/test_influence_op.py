"""Numerics and errors of the influence op, and errors that name an entry."""

from __future__ import annotations

import pytest
import torch
from op_forms import every_form

import pycircuit as pc
from pycircuit.ops import cases

NAN = float("nan")


@every_form
def test_influence_does_not_hide_nan(form: str, isa: str | None) -> None:
    """A row that is not finite has no shares: an error, or NaN in every column it leads to. Never a number."""
    rows, node, weight, _ = cases.CASES["influence"]["layers"](cases.generator(8))
    for bad in (NAN, float("inf")):
        spoiled = rows.clone()
        spoiled[0, -1] = bad
        with pc.use(form, isa=isa):
            try:
                got = pc.ops.influence(spoiled, node, weight)
            except ValueError as error:
                assert str(error).startswith("influence: ")
            else:
                assert not got[-1].isfinite()


@every_form
def test_influence_out_of_order(form: str, isa: str | None) -> None:
    rows, node, weight, _ = cases.CASES["influence"]["layers"](cases.generator(8))
    own, earlier = rows.clone(), rows.clone()
    own[6, node[6]] = 0.5
    earlier[-1, node[4]] = -0.5
    for misplaced, row in ((own, 6), (earlier, len(rows) - 1)):
        message = f"influence: rows must be in layer order, outputs first, .*, got row {row} with an edge to a node"
        with pc.use(form, isa=isa), pytest.raises(ValueError, match=message):
            pc.ops.influence(misplaced, node, weight)


@every_form
def test_influence_out_of_order_names_the_first_row(form: str, isa: str | None) -> None:
    """Rows are counted in the order in which they are read, wherever they are stored."""
    rows, node, weight, order = cases.CASES["influence"]["ordered_wide"](cases.generator(8))
    for row in (130, 70, 5):
        rows[order[row], node[row]] = 1.0
        with pc.use(form, isa=isa), pytest.raises(ValueError, match=f"got row {row} with an edge"):
            pc.ops.influence(rows, node, weight, order)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_ptr": [0, 2, 1, 3]}, "features.row_ptr must never fall, got 1 after 2 at 2"),
        ({"index": [0, 4, 9]}, "features.index must be from 0 to below 5, the rows of w_dec, got 9 at entry 2"),
        ({"index": [0, -1, 9]}, "features.index must be from 0 to below 5, the rows of w_dec, got -1 at entry 1"),
    ],
)
def test_errors_name_the_entry(changes: dict[str, list[int]], message: str) -> None:
    arrays = {"row_ptr": [0, 1, 2, 3], "index": [0, 1, 2], **changes}
    features = pc.SparseFeatures(torch.tensor(arrays["row_ptr"]), torch.tensor(arrays["index"]), torch.ones(3))
    with pytest.raises(ValueError, match=f"decode: {message}"):
        pc.ops.decode(features, torch.ones(5, 4))


@every_form
def test_influence_of_ordered_rows_is_that_of_their_copy(form: str, isa: str | None) -> None:
    """To the bit, whatever lies in rows that `order` does not name, and whether it names one twice."""
    g = cases.generator(8)
    for case in ("ordered", "ordered_misaligned", "ordered_wide"):
        rows, node, weight, order = cases.CASES["influence"][case](g)
        assert len(rows) > len(order) and rows.isnan().any()
        # The last row again, first of all, as an output.
        twice = [torch.cat([order[-1:], order]), torch.cat([node[:1], node]), torch.cat([weight[:1], weight])]
        with pc.use(form, isa=isa):
            for again, of, entering in ([order, node, weight], twice):
                got = pc.ops.influence(rows, of, entering, again)
                assert torch.equal(got, pc.ops.influence(rows[again], of, entering))
                assert got.any() and not got.isnan().any()


@every_form
def test_influence_out_of_order_by_its_order(form: str, isa: str | None) -> None:
    """Rows that lie in layer order, read in another: refused; and the other way round."""
    rows, node, weight, _ = cases.CASES["influence"]["layers"](cases.generator(8))
    back = torch.arange(len(rows)).flip(0)
    refused = pytest.raises(ValueError, match="influence: rows must be in layer order, outputs")
    with pc.use(form, isa=isa), refused:
        pc.ops.influence(rows, node.flip(0), weight.flip(0), back)
    with pc.use(form, isa=isa):
        got = pc.ops.influence(rows.flip(0), node, weight, back)
        assert torch.equal(got, pc.ops.influence(rows, node, weight))


@every_form
def test_influence_is_the_inverse(form: str, isa: str | None) -> None:
    """Rows normalised to shares S and entering weights w: (I - S^T)^-1 applied to what the outputs send."""
    rows, node, weight, _ = cases.CASES["influence"]["layers"](cases.generator(3))
    share = rows.double().abs()
    share /= share.sum(1, keepdim=True).clamp_min(1e-30)
    between = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    between[node[node >= 0]] = share[node >= 0]
    entering = weight.double() @ share
    exact = torch.linalg.solve(torch.eye(len(between), dtype=torch.float64) - between.T, entering)
    with pc.use(form, isa=isa):
        got = pc.ops.influence(rows, node, weight)
    assert torch.allclose(got.double(), exact, rtol=1e-5, atol=1e-7)


@every_form
def test_influence_preserves_sums(form: str, isa: str | None) -> None:
    """All that enters ends in columns without a row of their own (here no row is silent)."""
    rows, node, weight, _ = cases.CASES["influence"]["layers"](cases.generator(3))
    with pc.use(form, isa=isa):
        got = pc.ops.influence(rows, node, weight)
    ends = torch.ones(len(got), dtype=torch.bool)
    ends[node[node >= 0]] = False
    assert abs(float(got[ends].double().sum()) - float(weight.double().sum())) < 1e-5
