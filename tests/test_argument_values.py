"""Values of arguments: activations, attention, nodes and weights, NaN, NumPy numbers, empty dimensions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from argument_cases import (
    put,
    refuses,
    same_values,
    valid_call,
)

import pycircuit as pc
from pycircuit.ops import FileRows, RecomputedAttention, StoredAttention, cases
from pycircuit.ops.registry import OPS

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
    refuses("encode", {**valid_call("encode"), "activation": value}, name, rule, error)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("value", "rule", "error"),
    [(-1, "zero or positive, got -1", ValueError), (1.0, "int, got float", TypeError), (True, "bool", TypeError)],
)
def test_ignore_positions(value: Any, rule: str, error: type[Exception]) -> None:
    refuses("encode", {**valid_call("encode"), "ignore_positions": value}, "ignore_positions", rule, error)


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
    args = put(valid_call("attend_back"), f"attention.{field}", value)
    refuses("attend_back", args, f"attention.{field}", rule, error)


@pytest.mark.usefixtures("nothing_runs")
def test_attention_shapes() -> None:
    g, op, args = cases.generator(), "attend_back", valid_call("attend_back")
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
    args = valid_call("influence")
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
        w_finite = torch.ones(6, 4)
        with pc.use(form), pytest.raises(ValueError, match=r"encode: .* first at position 3, feature 0"):
            pc.ops.encode(x, w_finite, torch.zeros(6), rule)
        with pc.use(form):  # positions that are ignored have no features, NaN or not
            assert pc.ops.encode(x[:4], w_finite, torch.zeros(6), rule, ignore_positions=4).count == 0


def test_numbers_of_numpy() -> None:
    args = valid_call("encode")
    for rule, plain in ((pc.TopK(np.int64(2)), pc.TopK(2)), (pc.JumpReLU(np.float32(0.5)), pc.JumpReLU(0.5))):
        got = pc.ops.encode(**{**args, "activation": rule, "ignore_positions": np.int32(1)})
        assert same_values(got, pc.ops.encode(**{**args, "activation": plain, "ignore_positions": 1}))


@pytest.mark.parametrize("op", OPS)
def test_every_parameter_is_tested(op: str) -> None:
    assert tuple(valid_call(op)) == OPS[op].parameters


@pytest.mark.parametrize("form", ["reference", "native"])
def test_zero_in_any_dimension(form: str) -> None:
    row_ptr = torch.zeros(2, dtype=torch.int64)
    none = pc.SparseFeatures(row_ptr, row_ptr[:0], torch.zeros(0))
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
        assert pc.ops.attend_back(torch.ones(0, 2, 4), row_ptr[:1], pattern).shape == (0, 2, 4)
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
        assert not pc.ops.influence(torch.ones(2, 3), row_ptr[:0], torch.ones(0), row_ptr[:0]).any()


@pytest.mark.parametrize("op", ["decode", "edge_scores"])
def test_rows_in_a_file_are_checked_too(op: str, tmp_path: Any) -> None:
    path = tmp_path / "w"
    path.write_bytes(torch.zeros(6, 4).numpy().tobytes())
    rows = FileRows(path, 0, (6, 4), torch.float32)
    args = {**valid_call(op), "w_dec": rows}
    if op == "decode":
        args["bias"] = torch.zeros(3)
        refuses(op, args, "bias", r"shape \[4\]", ValueError)
    else:
        refuses(op, {**args, "gradient": torch.zeros(3, 5)}, "w_dec", r"shape \[6, 5\]", ValueError)
    features = replace(args["features"], index=torch.tensor([1, 4, 0, 2, 6]))
    refuses(op, {**args, "features": features}, "features.index", "got 6", ValueError)
