"""Every op's Triton form against the float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from devices import HAS_GPU, interpreted, on_each_device
from pycircuit.kernels import encode as encode_module
from pycircuit.kernels import select
from pycircuit.kernels.precision import dot_six, dot_three
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pycircuit as pc
from pycircuit.ops import attention as attention_module
from pycircuit.ops import cases
from pycircuit.ops.registry import OPS

EVERY = [(op, case) for op in OPS for case in cases.CASES[op]]
TOLERANCE = 3e-6  # float32 sums of at most a few thousand terms


def to(device: str, argument: Any) -> Any:
    """Copy of an argument on another device, with equal strides."""
    if isinstance(argument, Tensor):
        if argument.is_contiguous():
            return argument.to(device)
        storage = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage())
        return storage.to(device).as_strided(argument.shape, argument.stride(), argument.storage_offset())
    if isinstance(argument, pc.SparseFeatures):
        return argument.to(device)
    if isinstance(argument, pc.ops.StoredAttention | pc.ops.RecomputedAttention | pc.JumpReLU):
        moved = {k: v.to(device) for k, v in vars(argument).items() if isinstance(v, Tensor)}
        return replace(argument, **moved)
    return argument


def run(op: str, args: tuple[Any, ...], device: str = "cpu") -> Any:
    moved = [to(device, a) for a in args]
    with pc.use("triton"):
        got = getattr(pc.ops, op)(*moved)
    assert pc.last_run() == pc.ops.Ran(op, "triton", None)
    return got


def deviation(op: str, case: str, device: str) -> float:
    args = cases.CASES[op][case](cases.generator(1))
    truth = cases.exact(op, args)
    return cases.error(op, run(op, args, device), truth, args)


@interpreted
@pytest.mark.parametrize(("op", "case"), EVERY, ids=[f"{op}-{case}" for op, case in EVERY])
def test_equals_float64(op: str, case: str) -> None:
    assert deviation(op, case, "cpu") < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_equals_float64_on_gpu(op: str) -> None:
    wrong = {}
    for case in cases.CASES[op]:
        try:
            error = deviation(op, case, "cuda")
        except AssertionError as failed:  # a case's own finding, not the end of the others
            error = str(failed)
        if not (isinstance(error, float) and error < TOLERANCE):
            wrong[case] = error
    assert wrong == {}


@on_each_device
@pytest.mark.parametrize(
    ("op", "case"), [("attend_back", "grouped"), ("attend_back", "window"), ("edge_scores", "ragged")]
)
def test_fewer_parts(op: str, case: str, device: str) -> None:
    """Two parts of each number and one: less accurate where they are compiled, float32 in the interpreter."""
    form = OPS[op].form("triton")
    for parts, smallest, largest in ((3, 0.0, TOLERANCE), (2, 5e-7, 5e-5), (1, 1e-4, 2e-2)):
        args = cases.CASES[op][case](cases.generator(1))  # an op may write to its own
        truth = cases.exact(op, args)
        error = cases.error(op, form(*(to(device, a) for a in args), parts=parts), truth, args)
        assert smallest * (device == "cuda") <= error < largest, parts


def far_apart(t: Tensor) -> Tensor:
    """Rows of t 2^30 elements apart, so that the third lies past 2^31; only the pages touched are committed."""
    rows = torch.empty((len(t) - 1) * 2**30 + t.shape[1], dtype=t.dtype).as_strided(t.shape, (2**30, 1))
    rows.copy_(t)
    return rows


@interpreted
def test_offsets_past_31_bits() -> None:
    g = cases.generator(3)
    w = cases.normal(g, 3, 20, dtype=torch.bfloat16)
    far = far_apart(w)
    x, bias = cases.normal(g, 2, 20), torch.zeros(3)
    args: tuple[Any, ...] = (x, far, bias, pc.TopK(3, keep_negative=True), 0)
    assert cases.error("encode", run("encode", args), cases.exact("encode", (x, w, *args[2:])), args) < TOLERANCE
    features = pc.SparseFeatures(torch.tensor([0, 3, 4]), torch.tensor([0, 1, 2, 2]), torch.rand(4, generator=g))
    decoded = run("decode", (features, far, None))
    assert cases.error("decode", decoded, cases.exact("decode", (features, w, None)), ()) < TOLERANCE
    scores = (cases.normal(g, 3, 20), torch.tensor([0, 1, 3]), features, far, cases.normal(g, 2, 4))
    truth = cases.exact("edge_scores", (*scores[:3], w, scores[4]))
    assert cases.error("edge_scores", run("edge_scores", scores), truth, ()) < TOLERANCE


@interpreted
@pytest.mark.parametrize("window", [0, 150])
def test_recomputed_patterns_come_by_columns(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "SCRATCH_BYTES", 0)
    g = cases.generator(4)
    attention = cases.recomputed(g, 2, 1, 270, 8, window=window)
    args = (cases.normal(g, 270 + 130, 2, 6), cases.prefixes(270, 130), attention, None)
    assert attention_module.scratch_columns(2, 270) == 128
    assert cases.error("attend_back", run("attend_back", args), cases.exact("attend_back", args), args) < TOLERANCE


@triton.jit
def product_kernel(x, w, out, SIX: tl.constexpr, N: tl.constexpr):
    cell = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    if SIX:
        tl.store(out + cell, dot_six(tl.load(x + cell), tl.load(w + cell)))
    else:
        tl.store(out + cell, dot_three(tl.load(x + cell), tl.load(w + cell)))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_six_products_of_parts() -> None:
    """As accurate as float32, over all of its range; an infinity is seen."""
    g = cases.generator(4)
    scale = torch.logspace(-15, 15, 32)[:, None]
    x, w, out = cases.normal(g, 32, 32) * scale, cases.normal(g, 32, 32), torch.empty(32, 32)
    expected = x.double() @ w.double()
    for six, smallest, largest in ((False, 5e-7, 8e-6), (True, 0.0, 2e-7)):
        product_kernel[(1,)](x, w, out, SIX=six, N=32)
        assert smallest <= float(((out - expected).norm(dim=1) / expected.norm(dim=1)).max()) < largest
    x[3, 5] = torch.inf
    product_kernel[(1,)](x, w, out, SIX=True, N=32)
    assert not out[3].isfinite().any() and out[:3].isfinite().all() and out[4:].isfinite().all()


@interpreted
def test_topk_ties_go_to_the_lower_index() -> None:
    w = torch.zeros(300, 4)
    w[7::3, 0], w[250, 0] = 1.0, 2.0  # one above, then ties
    x = torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 0, 0]])
    got = run("encode", (x, w, torch.zeros(300), pc.TopK(4), 0))
    assert got.row_ptr.tolist() == [0, 4, 4]
    assert got.index.tolist() == [7, 10, 13, 250]
    signed = run("encode", (x, w, torch.zeros(300), pc.TopK(4, keep_negative=True), 0))
    assert signed.index.tolist() == [7, 10, 13, 250, 0, 1, 2, 3]


@interpreted
def test_topk_of_more_candidates_than_one_block() -> None:
    g = cases.generator(6)
    pre = cases.normal(g, 2, 2600).round(decimals=2)  # many ties
    selected = select.keep_largest(
        pc.SparseFeatures(torch.tensor([0, 2600, 5200]), torch.arange(2600).repeat(2), pre.flatten()), 37
    )
    for row in range(2):
        expected = pre[row].sort(descending=True, stable=True).indices[:37].sort().values
        assert torch.equal(selected.index[37 * row : 37 * (row + 1)], expected)
    assert torch.equal(select.kth_largest(pre, 37), pre.topk(37).values[:, -1])


@interpreted
def test_dense_activity_outgrows_the_stage() -> None:
    g = cases.generator(5)
    args = (cases.normal(g, 70, 16), cases.normal(g, 200, 16), torch.full((200,), 50.0), pc.ReLU(), 1)
    assert 70 * 200 // encode_module.PRE_ACTIVATIONS_PER_ENTRY + 1024 < 69 * 200
    got = run("encode", args)
    assert got.count == 69 * 200
    assert cases.error("encode", got, cases.exact("encode", args), args) < TOLERANCE


@interpreted
@pytest.mark.parametrize("activation", [pc.ReLU(), pc.JumpReLU(1.0), pc.BatchTopK(1.0), pc.TopK(2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_never_dropped(activation: Any, dtype: torch.dtype) -> None:
    x, w = torch.randn(3, 8, generator=cases.generator()), torch.randn(20, 8, generator=cases.generator(1)).to(dtype)
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"must not be NaN.*at position 1"):
        run("encode", (x, w, torch.zeros(20), activation, 0))


@interpreted
@pytest.mark.parametrize("row", [0, 5, 70, 130])
def test_influence_rows_out_of_order(row: int) -> None:
    for case in ("wide", "ordered_wide"):
        rows, node, weight, order = cases.CASES["influence"][case](cases.generator(2))
        stored = row + 3 if order is None else int(order[row + 3])
        rows[stored, int(node[row + 3])] = 1.0  # its own column: neither before nor after
        with pytest.raises(ValueError, match=f"layer order, .*, got row {row + 3} with an edge"):
            run("influence", (rows, node, weight, order))


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_same_bits_twice(op: str) -> None:
    case = {"encode": "topk_bf16", "decode": "slots", "attend_back": "all_options"}.get(op, "misaligned")
    first, second = (run(op, cases.CASES[op][case](cases.generator(1))) for _ in range(2))
    if op == "encode":
        assert torch.equal(first.index, second.index)
        first, second = first.value, second.value
    assert torch.equal(first, second)


class Sizes(TorchDispatchMode):
    """Elements of every tensor that torch makes; the interpreter's byte views of whole storages are not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket not in (torch.ops.aten.set_, torch.ops.aten.copy_):
            self.made += [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result


@interpreted
@pytest.mark.parametrize("activation", [pc.JumpReLU(3.0), pc.TopK(8)], ids=["jumprelu", "topk"])
def test_encode_never_makes_positions_by_features(activation: Any) -> None:
    g = cases.generator(7)
    positions, size = 16, 8192
    x, w = cases.normal(g, positions, 8), cases.normal(g, size, 8) / 8**0.5
    with Sizes() as sizes:
        features = encode_module.encode(x, w, torch.zeros(size), activation, 0)
    assert features.count > positions
    assert 0 < max(sizes.made) < positions * size / 8
