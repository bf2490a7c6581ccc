"""Wrong arrays raise `op: argument must ..., got ...` before anything is allocated."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from argument_cases import (
    EVERY_ARRAY,
    STORED,
    Change,
    get,
    put,
    refuses,
    valid_call,
    valid_call_with,
)
from torch import Tensor

import pycircuit as pc

MAY_GROW = {  # wider gradients, one more empty position or prefix, columns without a row: all valid
    ("attend_back", "y"), ("attend_back", "prefix_ptr"), ("decode", "features.row_ptr"),
    ("edge_scores", "features.row_ptr"), ("influence", "rows"),
}  # fmt: skip


def _strided(t: Tensor) -> Tensor:
    """Tensor of the same shape, a view of every second element of a row."""
    return torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., ::2]


ANY_ARRAY: dict[str, tuple[Change, str, type[Exception]]] = {
    "meta": (lambda t: t.to("meta"), "must hold data on the CPU or a GPU, got a tensor on meta", ValueError),
    "list": (lambda t: t.tolist(), "torch tensor, NumPy array or DLPack object, got list", TypeError),
    "none": (lambda t: object(), "torch tensor, NumPy array or DLPack object, got object", TypeError),
    "sparse": (lambda t: t.to_sparse(), "dense tensor, got layout torch.sparse", TypeError),
    "complex": (lambda t: t.to(torch.complex64), "got complex64", TypeError),
    "bool": (lambda t: t.bool(), "got bool", TypeError),
    "ndim": (lambda t: t[None], r"dimension|shape", ValueError),
    "object_array": (lambda t: np.array([None, "a"]), "an array torch can view, got object", TypeError),
    "masked": (lambda t: np.ma.masked_array(t.numpy(), t.numpy() > 0), "plain array, got a masked one", TypeError),
    "backwards": (lambda t: t.numpy()[::-1], "run forward in memory, got strides", ValueError),
}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("bad", ANY_ARRAY)
@pytest.mark.parametrize(("op", "path"), [*EVERY_ARRAY, STORED], ids=lambda v: v)
def test_any_array(op: str, path: str, bad: str) -> None:
    change, rule, error = ANY_ARRAY[bad]
    args = valid_call_with(op, path)
    # Four dimensions: no argument has more than three.
    value = get(args, path)
    value = change(value[None, None] if bad == "ndim" else value)
    if bad == "none" and path in ("attention.sinks", "bias"):
        value = "text"
        rule = "DLPack object, got str"
    refuses(op, put(args, path, value), path, rule, error)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), [*EVERY_ARRAY, STORED], ids=lambda v: v)
def test_integers_for_floats_and_back(op: str, path: str) -> None:
    args = valid_call_with(op, path)
    value = get(args, path)
    refuses(op, put(args, path, value.int()), path, "got int32", TypeError)
    if value.is_floating_point():
        with warnings.catch_warnings():  # deprecated by torch, still possible
            warnings.simplefilter("ignore")
            q = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
        refuses(op, put(args, path, q), path, "got qint8", TypeError)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), [*EVERY_ARRAY, STORED], ids=lambda v: v)
def test_not_contiguous(op: str, path: str) -> None:
    if path in ("activation.theta", "bias", "weight"):
        args = valid_call(op)  # short vectors are copied
        before = get(args, path)
        copy = _strided(before).copy_(before)
        assert not copy.is_contiguous()
        from pycircuit.ops import arguments

        arguments.CHECKS[op](**put(args, path, copy))
        return
    args = valid_call_with(op, path)
    refuses(op, put(args, path, _strided(get(args, path))), path, "must be contiguous.*got strides", ValueError)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), [p for p in (*EVERY_ARRAY, STORED) if p not in MAY_GROW], ids=lambda v: v)
def test_one_element_too_many(op: str, path: str) -> None:
    """One more along the last dimension: a check names this argument or the one it disagrees with."""
    args = valid_call_with(op, path)
    value = get(args, path)
    longer = torch.cat([value, value[..., -1:]], -1)
    with pytest.raises(ValueError, match=rf"^{op}: [\w.]+ must .+, got .+"):
        getattr(pc.ops, op)(**put(args, path, longer))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), [p for p in EVERY_ARRAY if get(valid_call(p[0]), p[1]).is_floating_point()])
def test_one_float64_among_float32(op: str, path: str) -> None:
    if path == "activation.theta":
        from pycircuit.ops import arguments

        checked = arguments.encode(**put(valid_call(op), path, get(valid_call(op), path).double()))
        assert checked[3].theta.dtype == torch.float32  # thresholds follow the weights
        return
    args = valid_call(op)
    with pytest.raises(TypeError, match=rf"^{op}: [\w.]+ must be float64 as .+ is, got float32"):
        getattr(pc.ops, op)(**put(args, path, get(args, path).double()))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), EVERY_ARRAY)
def test_inside_a_transform(op: str, path: str) -> None:
    args = valid_call(op)
    with pytest.raises(TypeError, match=rf"^{op}: [\w.]+ must be a tensor with memory of its own, got one without"):
        torch.func.vmap(lambda t: getattr(pc.ops, op)(**put(args, path, t)))(get(args, path)[None])


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), [p for p in EVERY_ARRAY if get(valid_call(p[0]), p[1]).is_floating_point()])
def test_views_without_values_of_their_own(op: str, path: str) -> None:
    args = valid_call(op)
    value = get(args, path)
    negated = torch._neg_view(value)
    refuses(op, put(args, path, negated), path, "lazily negated view; call .resolve_neg", ValueError)
    raw = torch.zeros(value.nbytes + 8, dtype=torch.uint8).numpy()[1 : 1 + value.nbytes]
    off = raw.view(np.float32).reshape(tuple(value.shape))
    refuses(op, put(args, path, off), path, "must be aligned to its 4-byte elements, got address", ValueError)


PREFIX = {
    "starts_late": ([1, 1, 3], "must start at 0, got 1"),
    "starts_below": ([-1, 1, 3], "must start at 0, got -1"),
    "falls": ([0, 4, 3], "must never fall, got 3 after 4 at 2"),
    "wraps": ([0, 2**63 - 1, -(2**63)], "must never fall, got -9223372036854775808 after 9223372036854775807 at 2"),
    "short": ([0, 1, 2], "must end at the 3 rows of .*, got 2"),
    "long": ([0, 1, 4], "must end at the 3 rows of .*, got 4"),
    "none": ([], r"must have shape \[n \+ 1\], got \[0\]"),
}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("bad", PREFIX)
@pytest.mark.parametrize("op", ["attend_back", "edge_scores"])
def test_prefix_ptr(op: str, bad: str) -> None:
    values, rule = PREFIX[bad]
    refuses(
        op, {**valid_call(op), "prefix_ptr": torch.tensor(values, dtype=torch.int64)}, "prefix_ptr", rule, ValueError
    )


FEATURES = {
    "falls": ("features.row_ptr", [0, 3, 2, 5], "must never fall, got 2 after 3 at 2"),
    "starts": ("features.row_ptr", [2, 2, 2, 5], "must start at 0, got 2"),
    "negative": ("features.index", [1, 4, -1, 2, 5], "from 0 to below 6, the rows of w_dec, got -1"),
    "above": ("features.index", [1, 4, 0, 2, 6], "from 0 to below 6, the rows of w_dec, got 6"),
    "far": ("features.index", [1, 4, 0, 2, 2**62], f"the rows of w_dec, got {2**62}"),
}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("bad", FEATURES)
@pytest.mark.parametrize("op", ["decode", "edge_scores"])
def test_features(op: str, bad: str) -> None:
    path, values, rule = FEATURES[bad]
    refuses(op, put(valid_call(op), path, torch.tensor(values)), path, rule, ValueError)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("op", ["decode", "edge_scores"])
def test_not_features(op: str) -> None:
    refuses(
        op, {**valid_call(op), "features": (1, 2, 3)}, "features", "must be pc.SparseFeatures, got tuple", TypeError
    )


@pytest.mark.parametrize("op", ["decode", "edge_scores"])
@pytest.mark.parametrize("write", ["torch", "numpy", "data"])
def test_features_changed_after_a_valid_call(op: str, write: str) -> None:
    args = valid_call(op)
    getattr(pc.ops, op)(**args)
    index = args["features"].index
    if write == "torch":
        index[0] = 2**40
    elif write == "numpy":
        index.numpy()[0] = 2**40  # torch's version counter does not see it
    else:
        index.data[0] = 2**40
    refuses(op, args, "features.index", f"got {2**40}", ValueError)


@pytest.mark.usefixtures("nothing_runs")
def test_out_of_edge_scores() -> None:
    op, args = "edge_scores", valid_call("edge_scores")
    frozen = np.zeros((2, 5), np.float32)
    frozen.flags.writeable = False
    refuses(op, {**args, "out": frozen}, "out", "writable, got a read-only array", ValueError)
    refuses(op, {**args, "out": torch.zeros(5).expand(2, 5)}, "out", "not overlap itself", ValueError)
    buffer = torch.zeros(20)
    refuses(op, {**args, "out": buffer.as_strided((2, 5), (4, 1))}, "out", r"got strides \(4, 1\)", ValueError)
    for name, view in (("gradient", buffer[8:20].view(3, 4)), ("w_dec", buffer.view(5, 4).expand(5, 4))):
        bad = {**args, name: view, "out": buffer[:10].view(2, 5)}
        if name == "w_dec":
            bad["features"] = replace(bad["features"], index=torch.tensor([1, 4, 0, 2, 3]))
        refuses(op, bad, "out", f"not share memory with {name}", ValueError)
    values = replace(args["features"], value=buffer[3:8])
    refuses(op, {**args, "features": values, "out": buffer[:10].view(2, 5)}, "out", "with features.value", ValueError)


def test_out_beside_the_gradient_in_one_buffer() -> None:
    args = valid_call("edge_scores")
    separate = pc.ops.edge_scores(**valid_call("edge_scores") | {"gradient": args["gradient"], "w_dec": args["w_dec"],
                                                        "features": args["features"]})  # fmt: skip
    buffer = torch.zeros(3, 9)
    buffer[:, :4] = args["gradient"]
    got = pc.ops.edge_scores(**{**args, "gradient": buffer[:, :4], "out": buffer[:2, 4:]})
    assert torch.equal(got, separate)
    assert torch.equal(buffer[:, :4], args["gradient"])


@pytest.mark.usefixtures("nothing_runs")
def test_out_of_attend_back() -> None:
    op, args = "attend_back", valid_call("attend_back")
    refuses(op, {**args, "out": torch.zeros(3, 4, 5)}, "out", r"shape \[3, 2, 5\]", ValueError)
    refuses(op, {**args, "out": torch.zeros(3, 2, 10)[..., ::2]}, "out", "contiguous", ValueError)
    refuses(op, {**args, "out": args["y"].view(-1)[:30].view(3, 2, 5)}, "out", "share memory with y", ValueError)
    frozen = np.zeros((3, 2, 5), np.float32)
    frozen.flags.writeable = False
    refuses(op, {**args, "out": frozen}, "out", "writable, got a read-only array", ValueError)


@pytest.mark.usefixtures("nothing_runs")
def test_huge_shapes_fail_without_being_built() -> None:
    """Views of a few bytes whose copies or results would take terabytes."""
    x = torch.zeros(1, 4).expand(2**40, 4)
    refuses("encode", {**valid_call("encode"), "x": x, "b_enc": torch.zeros(7)}, "b_enc", "got", ValueError)
    w_dec = torch.zeros(1, 2, 4).expand(2**40, 2, 4)
    refuses("decode", {**valid_call("decode"), "w_dec": w_dec, "bias": torch.zeros(3, 4)}, "bias", "got", ValueError)
