"""What a kernel must not do besides being close: vary, leave outputs unwritten, spread NaN, break identities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pycircuit as pc
from pycircuit.ops import RecomputedAttention, StoredAttention, cases
from pycircuit.ops.dispatch import native_isas
from pycircuit.ops.registry import OPS

NAN = float("nan")
ISAS = [name for name, supported in native_isas() if supported]
FORMS = [("reference", None), *(("native", isa) for isa in ISAS)]
EVERY = [(op, case) for op in OPS for case in cases.CASES[op]]
every_form = pytest.mark.parametrize(("form", "isa"), FORMS, ids=[isa or form for form, isa in FORMS])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(op: str, case: str, form: str, isa: str | None) -> list[Tensor]:
    args = cases.CASES[op][case](cases.generator(4))
    with pc.use(form, isa=isa):
        got = getattr(pc.ops, op)(*args)
    assert pc.last_run() == pc.ops.Ran(op, form, isa)
    return [got.row_ptr, got.index, got.value] if isinstance(got, pc.SparseFeatures) else [got]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("op", "case"), EVERY, ids=[f"{op}-{case}" for op, case in EVERY])
def test_same_bits(op: str, case: str, isa: str, threads: Callable[[int], None]) -> None:
    """Twice, and with one, two and three threads: the order of summation does not depend on them."""
    threads(2)
    first = run(op, case, "native", isa)
    for count in (2, 1, 3):
        threads(count)
        again = run(op, case, "native", isa)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory that torch.empty hands out holds NaN or huge numbers; counts how often that was done."""
    filled: list[int] = []

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            filled.append(t.numel())
            if not t.dtype.is_floating_point and t.dtype not in (torch.int64, torch.int32):
                return t
            return t.fill_(NAN if t.is_floating_point() else torch.iinfo(t.dtype).max // 3)

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    return filled


@pytest.fixture
def odd_defaults() -> Iterator[Callable[[], None]]:
    """Makes torch give float64 on no device where it is not told otherwise."""

    def change() -> None:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@every_form
@pytest.mark.parametrize("op", OPS)
def test_defaults_of_torch_change_nothing(
    op: str, form: str, isa: str | None, odd_defaults: Callable[[], None]
) -> None:
    expected, args = run(op, "tail_17", form, isa), cases.CASES[op]["tail_17"](cases.generator(4))
    odd_defaults()
    with pc.use(form, isa=isa):
        result = getattr(pc.ops, op)(*args)
    got = [result.row_ptr, result.index, result.value] if isinstance(result, pc.SparseFeatures) else [result]
    assert [(t.dtype, t.device.type) for t in got] == [(t.dtype, "cpu") for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op: str) -> None:
    expected = run(op, "tail_17", "reference", None)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(op, "tail_17", "reference", None)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("op", "case"), [e for e in EVERY if e[0] != "edge_scores"], ids=lambda v: v)
def test_poisoned_outputs(op: str, case: str, isa: str, poison: list[int]) -> None:
    args = cases.CASES[op][case](cases.generator(1))
    with pc.use("native", isa=isa):
        got = getattr(pc.ops, op)(*args)
    assert poison, "the form no longer allocates with torch.empty: poison what it does use"
    assert cases.error(op, got, cases.exact(op, args), args) < 3e-6


@every_form
def test_poisoned_out_of_attend_back(form: str, isa: str | None) -> None:
    for case in ("stored", "grouped", "all_options", "tail_7"):
        args = cases.CASES["attend_back"][case](cases.generator(1))
        out = torch.full((len(args[0]), args[2].groups, args[0].shape[2]), NAN)
        with pc.use(form, isa=isa):
            got = pc.ops.attend_back(*args[:3], out=out)
        assert got.data_ptr() == out.data_ptr()
        assert cases.error("attend_back", out, cases.exact("attend_back", args), args) < 3e-6


@every_form
def test_edge_scores_leaves_the_rest(form: str, isa: str | None) -> None:
    gradient, ptr, features, w_dec, _ = cases.CASES["edge_scores"]["ragged"](cases.generator(6))
    targets, n = len(ptr) - 1, features.count
    buffer = torch.full((targets, n + 40), NAN)
    out = buffer[:, 20 : 20 + n]
    inside = features.position()[None] < ptr.diff()[:, None]
    out[inside] = 0.5
    truth = cases.exact("edge_scores", (gradient, ptr, features, w_dec, torch.full((targets, n), 0.5)))
    with pc.use(form, isa=isa):
        pc.ops.edge_scores(gradient, ptr, features, w_dec, out)
    assert buffer[:, :20].isnan().all() and buffer[:, 20 + n :].isnan().all()  # neighbours in the same rows
    assert torch.equal(out.isnan(), ~inside)  # past a prefix nothing is written
    assert torch.allclose(out[inside].double(), truth[inside], rtol=1e-5, atol=1e-5)


@every_form
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_decode_spreads_only_what_it_must(form: str, isa: str | None, bad: float) -> None:
    features, w_dec, bias = cases.CASES["decode"]["slots"](cases.generator(8))
    with pc.use(form, isa=isa):
        clean = pc.ops.decode(features, w_dec, bias)
        row = int(features.index[3])
        w_dec[row, 2, 7] = bad
        got = pc.ops.decode(features, w_dec, bias)
        bias[4, 9] = bad
        biased = pc.ops.decode(features, w_dec, bias)
    hit = torch.zeros_like(clean, dtype=torch.bool)
    hit[2, features.position()[features.index == row], 7] = True
    assert hit.any() and torch.equal(~got.isfinite(), hit)
    assert torch.equal(got[~hit], clean[~hit])
    hit[4, :, 9] = True
    assert torch.equal(~biased.isfinite(), hit)


@every_form
def test_decode_ignores_rows_that_are_silent(form: str, isa: str | None) -> None:
    features, w_dec, bias = cases.CASES["decode"]["plain"](cases.generator(8))
    silent = torch.ones(len(w_dec), dtype=torch.bool)
    silent[features.index] = False
    w_dec[silent] = NAN
    with pc.use(form, isa=isa):
        assert pc.ops.decode(features, w_dec, bias).isfinite().all()


@every_form
@pytest.mark.parametrize("case", ["grouped", "all_options"])
def test_attend_back_spreads_only_what_it_must(form: str, isa: str | None, case: str) -> None:
    y, ptr, attention, _ = cases.CASES["attend_back"][case](cases.generator(8))
    target, i, head, column = 2, 2, 1, 3
    with pc.use(form, isa=isa):
        clean = pc.ops.attend_back(y, ptr, attention)
        y[int(ptr[target]) + i, head, column] = NAN
        got = pc.ops.attend_back(y, ptr, attention)
    kv = head // (y.shape[1] // attention.groups)
    begin, end = int(ptr[target]), int(ptr[target + 1])
    allowed = torch.zeros_like(clean, dtype=torch.bool)
    # A tile multiplies by the zeros above its diagonal, so later positions of this target may be NaN too;
    # never another target, head or column.
    allowed[begin:end, kv, column] = True
    assert got[begin : begin + i + 1, kv, column].isnan().all()
    assert torch.equal(got[~allowed], clean[~allowed])


@every_form
def test_attend_back_does_not_read_above_the_diagonal(form: str, isa: str | None) -> None:
    y, ptr, attention, _ = cases.CASES["attend_back"]["stored"](cases.generator(8))
    above = torch.ones_like(attention.pattern, dtype=torch.bool).triu(1)
    with pc.use(form, isa=isa):
        clean = pc.ops.attend_back(y, ptr, attention)
        spoiled = replace(attention, pattern=attention.pattern.masked_fill(above, NAN))
        assert torch.equal(pc.ops.attend_back(y, ptr, spoiled), clean)


@every_form
@pytest.mark.parametrize("window", [0, 5])
def test_attend_back_masks_and_does_not_multiply(form: str, isa: str | None, window: int) -> None:
    """exp of a logit outside the mask overflows; it must not reach a finite sum."""
    g = cases.generator(9)
    attention = cases.recomputed(g, 2, 1, 40, 8, window=window)
    y, ptr = cases.normal(g, 40, 2, 6), cases.prefixes(40)
    key, query = attention.key.clone(), attention.query.clone()
    query[:, :, 0], key[:, :, 0] = 1.0, 0.0
    key[:, 30:, 0] = 3000.0  # e^1060 for a query before it; after it the normaliser is as large
    draft = replace(attention, query=query, key=key)
    logits = draft.scale * (query @ key.expand(2, -1, -1).transpose(1, 2))
    seen = torch.ones(40, 40, dtype=torch.bool).tril()
    if window:
        seen &= torch.ones(40, 40, dtype=torch.bool).triu(1 - window)
    normaliser = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    with pc.use(form, isa=isa):
        got = pc.ops.attend_back(y, ptr, replace(draft, log_sum_exp=normaliser))
        stored = pc.ops.attend_back(y, ptr, StoredAttention(logits.masked_fill(~seen, -torch.inf).softmax(-1), 1))
    assert got.isfinite().all()
    assert torch.allclose(got, stored, atol=2e-3)  # logits near 1000 carry an error of a few 1e-4


@every_form
def test_edge_scores_spreads_only_what_it_must(form: str, isa: str | None) -> None:
    gradient, ptr, features, w_dec, out = cases.CASES["edge_scores"]["ragged"](cases.generator(8))
    w_dec, before = w_dec.clone(), out.clone()
    with pc.use(form, isa=isa):
        clean = pc.ops.edge_scores(gradient, ptr, features, w_dec, out.clone())
        w_dec[features.index[5], 3] = NAN
        gradient[int(ptr[3]) + 2, 1] = NAN
        got = pc.ops.edge_scores(gradient, ptr, features, w_dec, out)
    position = features.position()
    reached = position[None] < ptr.diff()[:, None]
    hit = reached & (features.index == features.index[5])[None]
    hit[3] |= position == 2
    assert torch.equal(got.isnan(), hit)
    assert torch.equal(got[~hit], clean[~hit])
    assert torch.equal(got[~reached], before[~reached])


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
def test_decode_is_linear(form: str, isa: str | None) -> None:
    features, w_dec, _ = cases.CASES["decode"]["slots"](cases.generator(3))
    other = replace(features, value=torch.randn(features.count, generator=cases.generator(4)))
    both = replace(features, value=2 * features.value - 3 * other.value)
    with pc.use(form, isa=isa):
        apart = 2 * pc.ops.decode(features, w_dec) - 3 * pc.ops.decode(other, w_dec)
        assert torch.allclose(pc.ops.decode(both, w_dec), apart, rtol=1e-4, atol=1e-4)


@every_form
def test_encode_then_decode_is_the_dense_layer(form: str, isa: str | None) -> None:
    g = cases.generator(3)
    x, w_enc, w_dec, b = cases.normal(g, 20, 16), cases.normal(g, 50, 16), cases.normal(g, 50, 16), cases.normal(g, 50)
    with pc.use(form, isa=isa):
        got = pc.ops.decode(pc.ops.encode(x, w_enc, b, pc.ReLU(), ignore_positions=2), w_dec)
    dense = torch.relu(x.double() @ w_enc.double().T + b.double()) @ w_dec.double()
    assert torch.allclose(got[2:].double(), dense[2:], rtol=1e-4, atol=1e-4)
    assert not got[:2].any()


@every_form
def test_edge_scores_adds(form: str, isa: str | None) -> None:
    gradient, ptr, features, w_dec, _ = cases.CASES["edge_scores"]["ragged"](cases.generator(3))
    out = torch.zeros(len(ptr) - 1, features.count)
    with pc.use(form, isa=isa):
        assert pc.ops.edge_scores(gradient, ptr, features, w_dec, out).data_ptr() == out.data_ptr()
        once = out.clone()
        pc.ops.edge_scores(gradient, ptr, features, w_dec, out)
    assert once.any() and torch.equal(out, 2 * once)


@every_form
def test_edge_scores_is_the_transpose_of_decode(form: str, isa: str | None) -> None:
    """One target that sees everything: the scores add up to gradient . decode(features)."""
    features, w_dec, _ = cases.CASES["decode"]["plain"](cases.generator(3))
    gradient = torch.randn(features.positions, w_dec.shape[1], generator=cases.generator(4))
    ptr = cases.prefixes(features.positions)
    with pc.use(form, isa=isa):
        scores = pc.ops.edge_scores(gradient, ptr, features, w_dec, torch.zeros(1, features.count))
        written = pc.ops.decode(features, w_dec)
    total = float((gradient.double() * written.double()).sum())
    assert abs(float(scores.double().sum()) - total) < 1e-5 * float((gradient * written).abs().sum())


@every_form
def test_attend_back_of_ones_gives_column_sums(form: str, isa: str | None) -> None:
    g = cases.generator(3)
    pattern = cases.attention_weights(g, 4, 37)
    with pc.use(form, isa=isa):
        got = pc.ops.attend_back(torch.ones(37, 4, 3), cases.prefixes(37), StoredAttention(pattern))
    columns = pattern.double().sum(1).T[..., None].expand(-1, -1, 3)
    assert torch.allclose(got.double(), columns, rtol=1e-5)
    assert abs(float(got.double().sum()) - 37 * 4 * 3) < 1e-2  # rows of a pattern sum to one


@every_form
@pytest.mark.parametrize(
    "case",
    [c for c in cases.CASES["attend_back"] if "recomputed" in c or c in ("softcap", "window", "sinks", "all_options")],
)
def test_stored_equals_recomputed(form: str, isa: str | None, case: str) -> None:
    y, ptr, attention, _ = cases.CASES["attend_back"][case](cases.generator(3))
    assert isinstance(attention, RecomputedAttention)
    stored = StoredAttention(attention.weights(attention.positions).contiguous(), attention.groups)
    with pc.use(form, isa=isa):
        a, b = pc.ops.attend_back(y, ptr, attention), pc.ops.attend_back(y, ptr, stored)
    assert float((a - b).norm()) <= 3e-6 * float(b.norm())


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
