"""Bad arguments raise `op: argument must ..., got ...` before anything is allocated; good ones of any library work."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pycircuit as pc
from pycircuit.ops import FileRows, RecomputedAttention, StoredAttention, cases
from pycircuit.ops.registry import OPS

Change = Callable[[Any], Any]


def good(op: str) -> dict[str, Any]:
    """A small sound call; outputs would be far larger than inputs if shapes were."""
    g = cases.generator(3)
    features = pc.SparseFeatures(torch.tensor([0, 2, 2, 5]), torch.tensor([1, 4, 0, 2, 5]), torch.rand(5, generator=g))
    ptr = torch.tensor([0, 1, 3])
    calls: dict[str, dict[str, Any]] = {
        "encode": {"x": torch.randn(3, 4), "w_enc": torch.randn(6, 4), "b_enc": torch.randn(6),
                   "activation": pc.JumpReLU(torch.rand(6)), "ignore_positions": 0},
        "decode": {"features": features, "w_dec": torch.randn(6, 2, 4), "bias": torch.randn(2, 4)},
        "attend_back": {"y": torch.randn(3, 4, 5), "prefix_ptr": ptr,
                        "attention": cases.recomputed(g, 4, 2, 3, 6, sinks=torch.zeros(4)), "out": None},
        "edge_scores": {"gradient": torch.randn(3, 4), "prefix_ptr": ptr, "features": features,
                        "w_dec": torch.randn(6, 4), "out": torch.zeros(2, 5)},
        "influence": {"rows": torch.tensor([[0.0, 1.0, 0.0], [9.0, 9.0, 9.0], [1.0, 2.0, 3.0]]),
                      "node": torch.tensor([-1, 0]), "weight": torch.tensor([1.0, 0.0]),
                      "order": torch.tensor([2, 0])},
    }  # fmt: skip
    return calls[op]


ARRAYS = {  # every array argument, by the path to it
    "encode": ("x", "w_enc", "b_enc", "activation.theta"),
    "decode": ("features.row_ptr", "features.index", "features.value", "w_dec", "bias"),
    "attend_back": ("y", "prefix_ptr", "attention.query", "attention.key", "attention.log_sum_exp",
                    "attention.sinks"),
    "edge_scores": ("gradient", "prefix_ptr", "features.row_ptr", "features.index", "features.value", "w_dec", "out"),
    "influence": ("rows", "node", "weight", "order"),
}  # fmt: skip
EVERY_ARRAY = [(op, path) for op, paths in ARRAYS.items() for path in paths]
STORED = ("attend_back", "attention.pattern")
MAY_GROW = {  # wider gradients, one empty position or prefix more, columns without a row: all sound
    ("attend_back", "y"), ("attend_back", "prefix_ptr"), ("decode", "features.row_ptr"),
    ("edge_scores", "features.row_ptr"), ("influence", "rows"),
}  # fmt: skip


def get(args: dict[str, Any], path: str) -> Any:
    name, _, inner = path.partition(".")
    return getattr(args[name], inner) if inner else args[name]


def put(args: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    name, _, inner = path.partition(".")
    return {**args, name: replace(args[name], **{inner: value}) if inner else value}


def call(op: str, path: str) -> dict[str, Any]:
    """A sound call that has an argument at `path`."""
    args = good(op)
    if path == "attention.pattern":
        args["attention"] = StoredAttention(cases.attention_weights(cases.generator(), 4, 3), 2)
    return args


class Allocations(TorchDispatchMode):
    """The largest result of any torch operation that is new memory, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor) and not a.is_sparse}
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.layout == torch.strided and t.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No implementation is even chosen: outputs are allocated by implementations only."""
    monkeypatch.setattr("pycircuit.ops.plan", lambda request: pytest.fail(f"{request.op} passed its checks"))


def refuses(op: str, args: dict[str, Any], name: str, rule: str, error: type[Exception]) -> None:
    with Allocations() as seen, pytest.raises(error) as caught:
        getattr(pc.ops, op)(**args)
    assert seen.largest <= 128  # flags and scalars; the smallest result here is larger
    message = str(caught.value)
    assert re.match(rf"{op}: {re.escape(name)} must .+, got .+", message), message
    assert re.search(rule, message), message


def _strided(t: Tensor) -> Tensor:
    """The same shape, every second element of a row."""
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
    args = call(op, path)
    # Four dimensions where three are the most that any argument has.
    value = get(args, path)
    value = change(value[None, None] if bad == "ndim" else value)
    if bad == "none" and path in ("attention.sinks", "bias"):
        value = "text"
        rule = "DLPack object, got str"
    refuses(op, put(args, path, value), path, rule, error)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), [*EVERY_ARRAY, STORED], ids=lambda v: v)
def test_integers_for_floats_and_back(op: str, path: str) -> None:
    args = call(op, path)
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
        args = good(op)  # short vectors are copied
        before = get(args, path)
        copy = _strided(before).copy_(before)
        assert not copy.is_contiguous()
        from pycircuit.ops import arguments

        arguments.CHECKS[op](**put(args, path, copy))
        return
    args = call(op, path)
    refuses(op, put(args, path, _strided(get(args, path))), path, "must be contiguous.*got strides", ValueError)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), [p for p in (*EVERY_ARRAY, STORED) if p not in MAY_GROW], ids=lambda v: v)
def test_one_too_many(op: str, path: str) -> None:
    """One more along the last dimension: some check of shapes names an argument, this one or its partner."""
    args = call(op, path)
    value = get(args, path)
    longer = torch.cat([value, value[..., -1:]], -1)
    with pytest.raises(ValueError, match=rf"^{op}: [\w.]+ must .+, got .+"):
        getattr(pc.ops, op)(**put(args, path, longer))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), [p for p in EVERY_ARRAY if get(good(p[0]), p[1]).is_floating_point()])
def test_one_float64_among_float32(op: str, path: str) -> None:
    if path == "activation.theta":
        from pycircuit.ops import arguments

        checked = arguments.encode(**put(good(op), path, get(good(op), path).double()))
        assert checked[3].theta.dtype == torch.float32  # thresholds follow the weights
        return
    args = good(op)
    with pytest.raises(TypeError, match=rf"^{op}: [\w.]+ must be float64 as .+ is, got float32"):
        getattr(pc.ops, op)(**put(args, path, get(args, path).double()))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), EVERY_ARRAY)
def test_inside_a_transform(op: str, path: str) -> None:
    args = good(op)
    with pytest.raises(TypeError, match=rf"^{op}: [\w.]+ must be a tensor with memory of its own, got one without"):
        torch.func.vmap(lambda t: getattr(pc.ops, op)(**put(args, path, t)))(get(args, path)[None])


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("op", "path"), [p for p in EVERY_ARRAY if get(good(p[0]), p[1]).is_floating_point()])
def test_not_its_own_values(op: str, path: str) -> None:
    args = good(op)
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
    refuses(op, {**good(op), "prefix_ptr": torch.tensor(values, dtype=torch.int64)}, "prefix_ptr", rule, ValueError)


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
    refuses(op, put(good(op), path, torch.tensor(values)), path, rule, ValueError)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("op", ["decode", "edge_scores"])
def test_not_features(op: str) -> None:
    refuses(op, {**good(op), "features": (1, 2, 3)}, "features", "must be pc.SparseFeatures, got tuple", TypeError)


@pytest.mark.parametrize("op", ["decode", "edge_scores"])
@pytest.mark.parametrize("write", ["torch", "numpy", "data"])
def test_features_spoiled_after_a_good_call(op: str, write: str) -> None:
    args = good(op)
    getattr(pc.ops, op)(**args)
    index = args["features"].index
    if write == "torch":
        index[0] = 2**40
    elif write == "numpy":
        index.numpy()[0] = 2**40  # torch's version counter does not see it
    else:
        index.data[0] = 2**40
    refuses(op, args, "features.index", f"got {2**40}", ValueError)


ACTIVATIONS: dict[str, tuple[Any, str, str, type[Exception]]] = {
    "nothing": (None, "activation", "pc.TopK.*got NoneType", TypeError),
    "text": ("relu", "activation", "got str", TypeError),
    "class": (pc.ReLU, "activation", "got type", TypeError),
    "nan": (pc.JumpReLU(float("nan")), "activation.theta", "got NaN", ValueError),
    "nan_inside": (pc.JumpReLU(torch.tensor([0, 1, float("nan"), 0, 0, 0])), "activation.theta", "NaN, got 1 ",
                   ValueError),
    "theta_list": (pc.JumpReLU([1.0] * 6), "activation.theta", "got list", TypeError),
    "theta_size": (pc.JumpReLU(torch.ones(5)), "activation.theta", r"shape \[6\] .*got \[5\]", ValueError),
    "theta_ndim": (pc.JumpReLU(torch.ones(1, 1)), "activation.theta", r"got shape \[1, 1\]", ValueError),
    "threshold_nan": (pc.BatchTopK(float("nan")), "activation.threshold", "got NaN", ValueError),
    "threshold_tensor": (pc.BatchTopK(torch.ones(())), "activation.threshold", "got Tensor; call .item", TypeError),
    "k_zero": (pc.TopK(0), "activation.k", "at least 1, got 0", ValueError),
    "k_negative": (pc.TopK(-3), "activation.k", "at least 1, got -3", ValueError),
    "k_float": (pc.TopK(2.0), "activation.k", "an int, got float", TypeError),
    "k_bool": (pc.TopK(True), "activation.k", "an int, got bool", TypeError),
    "keep": (pc.TopK(2, keep_negative=1), "activation.keep_negative", "a bool, got int", TypeError),
}  # fmt: skip


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("bad", ACTIVATIONS)
def test_activation(bad: str) -> None:
    value, name, rule, error = ACTIVATIONS[bad]
    refuses("encode", {**good("encode"), "activation": value}, name, rule, error)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("value", "rule", "error"),
    [(-1, "zero or positive, got -1", ValueError), (1.0, "int, got float", TypeError), (True, "bool", TypeError)],
)
def test_ignore_positions(value: Any, rule: str, error: type[Exception]) -> None:
    refuses("encode", {**good("encode"), "ignore_positions": value}, "ignore_positions", rule, error)


ATTENTION: dict[str, tuple[str, Any, str, type[Exception]]] = {
    "scale_nan": ("scale", float("nan"), "got NaN", ValueError),
    "scale_negative": ("scale", -1.0, "zero or positive and finite, got -1.0", ValueError),
    "scale_tensor": ("scale", torch.ones(()), "must be a number, got Tensor; call .item", TypeError),
    "softcap_inf": ("softcap", float("inf"), "zero or positive and finite, got inf", ValueError),
    "softcap_none": ("softcap", None, "must be a number, got NoneType", TypeError),
    "window_negative": ("window", -2, "zero or positive, got -2", ValueError),
    "window_float": ("window", 6.0, "an int, got float", TypeError),
}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("bad", ATTENTION)
def test_attention_options(bad: str) -> None:
    field, value, rule, error = ATTENTION[bad]
    args = put(good("attend_back"), f"attention.{field}", value)
    refuses("attend_back", args, f"attention.{field}", rule, error)


@pytest.mark.usefixtures("nothing_runs")
def test_attention_shapes() -> None:
    g, op, args = cases.generator(), "attend_back", good("attend_back")
    pattern = cases.attention_weights(g, 4, 3)
    for groups, rule, error in ((0, "at least 1, got 0", ValueError), (2.0, "an int, got float", TypeError)):
        bad = {**args, "attention": StoredAttention(pattern, groups)}
        refuses(op, bad, "attention.kv_heads", rule, error)
    bad = {**args, "attention": StoredAttention(pattern, 3)}
    refuses(op, bad, "attention's kv heads", "divide the 4 heads of y, got 3", ValueError)
    bad = {**args, "attention": StoredAttention(pattern[:, :1, :1].contiguous())}
    refuses(op, bad, "prefix_ptr", "no prefix longer than the attention's 1 positions, got 2", ValueError)
    bad = {**args, "attention": StoredAttention(pattern[:, :2].contiguous())}
    refuses(op, bad, "attention.pattern", r"shape \[4, 2, 2\]", ValueError)
    refuses(op, {**args, "attention": pattern}, "attention", "StoredAttention or .*, got Tensor", TypeError)


@pytest.mark.usefixtures("nothing_runs")
def test_influence_values() -> None:
    args = good("influence")
    for node, got in (([-1, 3], 3), ([-2, 0], -2)):
        rule = f"-1 or a column below 3, got {got}"
        refuses("influence", {**args, "node": torch.tensor(node)}, "node", rule, ValueError)
    for weight in (float("nan"), float("inf"), -0.5):
        bad = {**args, "weight": torch.tensor([1.0, weight])}
        refuses("influence", bad, "weight", "finite and not negative, got", ValueError)
    for order, got in (([2, 3], 3), ([-1, 0], -1), ([2, 2**62], 2**62)):
        rule = rf"from 0 to below 3, the rows there are, got {got} at entry \d$"
        refuses("influence", {**args, "order": torch.tensor(order)}, "order", rule, ValueError)
    rule = r"shape \[1\] \(one for each entry of order\), got \[2\]"
    refuses("influence", {**args, "order": torch.tensor([2])}, "node", rule, ValueError)
    rule = r"shape \[3\] \(one for each row\), got \[2\]"
    refuses("influence", {**args, "order": None}, "node", rule, ValueError)
    bad = {**args, "node": torch.tensor([-1, 0, 1]), "order": None}
    refuses("influence", bad, "weight", rule, ValueError)


@pytest.mark.usefixtures("nothing_runs")
def test_out_of_edge_scores() -> None:
    op, args = "edge_scores", good("edge_scores")
    frozen = np.zeros((2, 5), np.float32)
    frozen.flags.writeable = False
    refuses(op, {**args, "out": frozen}, "out", "writable, got a read-only array", ValueError)
    refuses(op, {**args, "out": torch.zeros(5).expand(2, 5)}, "out", "not overlap itself", ValueError)
    room = torch.zeros(20)
    refuses(op, {**args, "out": room.as_strided((2, 5), (4, 1))}, "out", r"got strides \(4, 1\)", ValueError)
    for name, view in (("gradient", room[8:20].view(3, 4)), ("w_dec", room.view(5, 4).expand(5, 4))):
        bad = {**args, name: view, "out": room[:10].view(2, 5)}
        if name == "w_dec":
            bad["features"] = replace(bad["features"], index=torch.tensor([1, 4, 0, 2, 3]))
        refuses(op, bad, "out", f"not share memory with {name}", ValueError)
    values = replace(args["features"], value=room[3:8])
    refuses(op, {**args, "features": values, "out": room[:10].view(2, 5)}, "out", "with features.value", ValueError)


def test_out_beside_the_gradient_in_one_buffer() -> None:
    args = good("edge_scores")
    apart = pc.ops.edge_scores(**good("edge_scores") | {"gradient": args["gradient"], "w_dec": args["w_dec"],
                                                        "features": args["features"]})  # fmt: skip
    buffer = torch.zeros(3, 9)
    buffer[:, :4] = args["gradient"]
    got = pc.ops.edge_scores(**{**args, "gradient": buffer[:, :4], "out": buffer[:2, 4:]})
    assert torch.equal(got, apart)
    assert torch.equal(buffer[:, :4], args["gradient"])


@pytest.mark.usefixtures("nothing_runs")
def test_out_of_attend_back() -> None:
    op, args = "attend_back", good("attend_back")
    refuses(op, {**args, "out": torch.zeros(3, 4, 5)}, "out", r"shape \[3, 2, 5\]", ValueError)
    refuses(op, {**args, "out": torch.zeros(3, 2, 10)[..., ::2]}, "out", "contiguous", ValueError)
    refuses(op, {**args, "out": args["y"].view(-1)[:30].view(3, 2, 5)}, "out", "share memory with y", ValueError)
    frozen = np.zeros((3, 2, 5), np.float32)
    frozen.flags.writeable = False
    refuses(op, {**args, "out": frozen}, "out", "writable, got a read-only array", ValueError)


@pytest.mark.usefixtures("nothing_runs")
def test_huge_shapes_fail_without_being_built() -> None:
    """Views of a few bytes that would take terabytes to copy or to answer."""
    x = torch.zeros(1, 4).expand(2**40, 4)
    refuses("encode", {**good("encode"), "x": x, "b_enc": torch.zeros(7)}, "b_enc", "got", ValueError)
    w_dec = torch.zeros(1, 2, 4).expand(2**40, 2, 4)
    refuses("decode", {**good("decode"), "w_dec": w_dec, "bias": torch.zeros(3, 4)}, "bias", "got", ValueError)


@pytest.mark.parametrize("form", ["reference", "native"])
def test_nan_in_encode_is_named(form: str) -> None:
    x, w_enc = torch.ones(5, 4), torch.ones(6, 4)
    x[3, 2], w_enc[4, 0] = float("nan"), float("inf")
    x[:, 0] = 0.0  # 0 * inf: feature 4 is NaN everywhere
    rules = (pc.ReLU(), pc.JumpReLU(9.0), pc.BatchTopK(9.0), pc.TopK(2), pc.TopK(2, keep_negative=True))
    for rule in rules:
        with (
            pc.use(form),
            pytest.raises(ValueError, match=r"^encode: .* must not be NaN, got .* position 0, feature 4"),
        ):
            pc.ops.encode(x, w_enc, torch.zeros(6), rule)
        w_good = torch.ones(6, 4)
        with pc.use(form), pytest.raises(ValueError, match=r"encode: .* first at position 3, feature 0"):
            pc.ops.encode(x, w_good, torch.zeros(6), rule)
        with pc.use(form):  # positions that are ignored have no features, NaN or not
            assert pc.ops.encode(x[:4], w_good, torch.zeros(6), rule, ignore_positions=4).count == 0


class OnlyDLPack:
    """An array of some other library: nothing but the two methods of the protocol."""

    def __init__(self, t: Tensor) -> None:
        self._t = t

    def __dlpack__(self, stream: Any = None, **_: Any) -> Any:
        return self._t.detach().__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._t.__dlpack_device__()


class BrokenDLPack:
    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("cannot export")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def _read_only(t: Tensor) -> Any:
    array = t.numpy().copy()
    array.flags.writeable = False
    return array


FOREIGN: dict[str, Change] = {
    "numpy": lambda t: t.numpy().copy(),
    "read_only": _read_only,
    "dlpack": lambda t: OnlyDLPack(t.clone()),
    "requires_grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "parameter": lambda t: torch.nn.Parameter(t.clone()) if t.is_floating_point() else t,
}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, pc.SparseFeatures):
        return all(_same(u, v) for u, v in zip(vars(a).values(), vars(b).values(), strict=True) if u is not None)
    return torch.equal(a, b)


@pytest.mark.parametrize("form", ["reference", "native"])
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize(("op", "path"), [*EVERY_ARRAY, STORED], ids=lambda v: v)
def test_foreign_arrays(op: str, path: str, kind: str, form: str) -> None:
    if (path, kind) == ("out", "read_only"):
        return  # refused: test_out_of_edge_scores
    torch.manual_seed(7)
    plain = call(op, path)
    torch.manual_seed(7)
    args = call(op, path)
    with pc.use(form):
        expected = getattr(pc.ops, op)(**plain)
        got = getattr(pc.ops, op)(**put(args, path, FOREIGN[kind](get(args, path))))
    assert _same(got, expected)
    results = vars(got).values() if isinstance(got, pc.SparseFeatures) else (got,)
    assert not any(isinstance(t, Tensor) and t.requires_grad for t in results)


def test_out_is_written_through() -> None:
    args = good("edge_scores")
    array = np.zeros((2, 5), np.float32)
    expected = pc.ops.edge_scores(**args)
    pc.ops.edge_scores(**{**args, "out": array})
    assert np.array_equal(array, expected.numpy())
    z = np.full((3, 2, 5), np.nan, np.float32)
    other = good("attend_back")
    assert np.array_equal(pc.ops.attend_back(**{**other, "out": z}).numpy(), z)
    assert torch.equal(torch.from_numpy(z), pc.ops.attend_back(**other))


def test_broken_dlpack() -> None:
    refuses("encode", {**good("encode"), "x": BrokenDLPack()}, "x", "got BrokenDLPack: cannot export", TypeError)


def test_numbers_of_numpy() -> None:
    args = good("encode")
    for rule, plain in ((pc.TopK(np.int64(2)), pc.TopK(2)), (pc.JumpReLU(np.float32(0.5)), pc.JumpReLU(0.5))):
        got = pc.ops.encode(**{**args, "activation": rule, "ignore_positions": np.int32(1)})
        assert _same(got, pc.ops.encode(**{**args, "activation": plain, "ignore_positions": 1}))


@pytest.mark.parametrize("op", OPS)
def test_parameters_are_those_tested(op: str) -> None:
    assert tuple(good(op)) == OPS[op].parameters


@pytest.mark.parametrize("form", ["reference", "native"])
def test_zero_in_any_dimension(form: str) -> None:
    one = torch.zeros(2, dtype=torch.int64)
    none = pc.SparseFeatures(one, one[:0], torch.zeros(0))
    with pc.use(form):
        for p, f, d in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)):
            b = torch.ones(f)
            for rule in (pc.ReLU(), pc.TopK(2), pc.JumpReLU(torch.zeros(f))):
                got = pc.ops.encode(torch.ones(p, d), torch.ones(f, d), b, rule)
                assert got.positions == p
                assert d or got.count == p * min(f, 2 if isinstance(rule, pc.TopK) else f)
        for shape in ((0, 4), (3, 0), (0, 2, 4), (3, 0, 4), (3, 2, 0)):
            assert pc.ops.decode(none, torch.ones(shape)).shape == (*shape[1:-1], 1, shape[-1])
        pattern = StoredAttention(torch.ones(2, 3, 3))
        for rows, width in ((0, 4), (3, 0), (0, 0)):
            ptr = torch.tensor([0, rows])
            assert pc.ops.attend_back(torch.ones(rows, 2, width), ptr, pattern).shape == (rows, 2, width)
        assert pc.ops.attend_back(torch.ones(0, 2, 4), one[:1], pattern).shape == (0, 2, 4)
        empty = RecomputedAttention(torch.ones(2, 3, 0), torch.ones(1, 3, 0), torch.zeros(2, 3), 1.0)
        assert torch.equal(
            pc.ops.attend_back(torch.ones(1, 2, 1), torch.tensor([0, 1]), empty), torch.full((1, 1, 1), 2.0)
        )
        for targets, width in ((0, 4), (2, 0), (2, 4)):
            ptr = torch.zeros(targets + 1, dtype=torch.int64)
            out = pc.ops.edge_scores(torch.ones(0, width), ptr, none, torch.ones(3, width), torch.ones(targets, 0))
            assert out.shape == (targets, 0)
        for count, columns in ((0, 3), (0, 0), (2, 0)):
            node = torch.full((count,), -1)
            assert not pc.ops.influence(torch.ones(count, columns), node, torch.ones(count)).any()
        assert not pc.ops.influence(torch.ones(2, 3), one[:0], torch.ones(0), one[:0]).any()


@pytest.mark.parametrize("op", ["decode", "edge_scores"])
def test_rows_in_a_file_are_checked_too(op: str, tmp_path: Any) -> None:
    path = tmp_path / "w"
    path.write_bytes(torch.zeros(6, 4).numpy().tobytes())
    rows = FileRows(path, 0, (6, 4), torch.float32)
    args = {**good(op), "w_dec": rows}
    if op == "decode":
        args["bias"] = torch.zeros(3)
        refuses(op, args, "bias", r"shape \[4\]", ValueError)
    else:
        refuses(op, {**args, "gradient": torch.zeros(3, 5)}, "w_dec", r"shape \[6, 5\]", ValueError)
    features = replace(args["features"], index=torch.tensor([1, 4, 0, 2, 6]))
    refuses(op, {**args, "features": features}, "features.index", "got 6", ValueError)
