"""Native kernels against the float64 reference over drawn shapes, sparsity, raggedness, strides and options."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pycircuit as pc
from pycircuit.ops import StoredAttention, cases

EXAMPLES = settings(max_examples=120)
SEEDS = st.integers(0, 2**20)
SIZES = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129]))
PREFIXES = st.lists(st.integers(0, 40), max_size=9)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])


def check(op: str, *args: Any) -> None:
    truth = cases.exact(op, args)
    with pc.use("native"):
        got = getattr(pc.ops, op)(*args)
    ran = pc.last_run()
    assert ran is not None and (ran.op, ran.implementation) == (op, "native")
    assert cases.error(op, got, truth, args) < 3e-6


def strided(t: Tensor, gap: int, skip: int) -> Tensor:
    """The same values, rows `gap` elements further apart and `skip` elements into their memory."""
    rows = t.reshape(-1, t.shape[-1]) if t.numel() else t.new_zeros(0, t.shape[-1])
    buffer = torch.full((skip + len(rows) * (t.shape[-1] + gap),), float("nan"), dtype=t.dtype)
    view = buffer[skip:].as_strided(rows.shape, (t.shape[-1] + gap, 1)) if len(rows) else rows
    return view.copy_(rows).unflatten(0, t.shape[:-1]) if t.numel() else t


def drawn_features(g: torch.Generator, positions: int, size: int, density: float) -> pc.SparseFeatures:
    """Any density, values of either sign, exact zeros among them."""
    mask = torch.rand(positions, size, generator=g) < density
    row_ptr = torch.zeros(positions + 1, dtype=torch.int64)
    row_ptr[1:] = mask.sum(1).cumsum(0)
    value = torch.randn(int(row_ptr[-1]), generator=g)
    return pc.SparseFeatures(row_ptr, mask.nonzero()[:, 1].contiguous(), value * (value.abs() > 0.1))


@EXAMPLES
@given(SEEDS, SIZES, SIZES, SIZES, FLOATS, st.integers(0, 5), st.integers(0, 3), st.data())
def test_encode(
    seed: int, positions: int, width: int, size: int, dtype: torch.dtype, gap: int, skip: int, data: st.DataObject
) -> None:
    g = cases.generator(seed)
    rules = (
        pc.ReLU(),
        pc.JumpReLU(float(seed % 3) - 0.5),
        pc.JumpReLU(torch.randn(size, generator=g)),
        pc.BatchTopK(float(seed % 5) / 4 - 0.25),
        pc.TopK(1 + seed % 40),
        pc.TopK(1 + seed % 7, keep_negative=True),
    )
    rule, ignore = data.draw(st.sampled_from(rules)), data.draw(st.integers(0, positions + 1))
    x = strided(cases.normal(g, positions, width), gap, skip)
    w_enc = strided(cases.normal(g, size, width, dtype=dtype) / max(width, 1) ** 0.5, gap, skip)
    check("encode", x, w_enc, cases.normal(g, size), rule, ignore)


@EXAMPLES
@given(
    SEEDS,
    SIZES,
    SIZES,
    st.integers(1, 40),
    st.sampled_from([None, 1, 2, 5]),
    st.floats(0, 1),
    FLOATS,
    st.integers(0, 5),
    st.integers(0, 3),
    st.booleans(),
)
def test_decode(
    seed: int,
    positions: int,
    width: int,
    size: int,
    slots: int | None,
    density: float,
    dtype: torch.dtype,
    gap: int,
    skip: int,
    with_bias: bool,
) -> None:
    g = cases.generator(seed)
    shape = (size, width) if slots is None else (size, slots, width)
    w_dec = strided(cases.normal(g, *shape, dtype=dtype), gap, skip)
    bias = cases.normal(g, *shape[1:]) if with_bias else None
    check("decode", drawn_features(g, positions, size, density), w_dec, bias)


HEADS = st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (6, 2), (6, 1), (3, 3)])


@EXAMPLES
@given(SEEDS, PREFIXES, HEADS, st.integers(1, 40), st.integers(0, 70))
def test_attend_back_stored(seed: int, lengths: list[int], heads: tuple[int, int], width: int, spare: int) -> None:
    g = cases.generator(seed)
    pattern = cases.attention_weights(g, heads[0], max(lengths, default=0) + spare)
    y = cases.normal(g, sum(lengths), heads[0], width)
    check("attend_back", y, cases.prefixes(*lengths), StoredAttention(pattern, heads[1]), None)


@EXAMPLES
@given(
    SEEDS,
    PREFIXES,
    HEADS,
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.7, 30.0]),
    st.integers(0, 45),
    st.booleans(),
)
def test_attend_back_recomputed(
    seed: int,
    lengths: list[int],
    heads: tuple[int, int],
    width: int,
    qk_width: int,
    softcap: float,
    window: int,
    sinks: bool,
) -> None:
    g = cases.generator(seed)
    positions = max(lengths, default=0) + seed % 5
    extra = {"sinks": cases.normal(g, heads[0])} if sinks else {}
    attention = cases.recomputed(g, *heads, positions, qk_width, softcap=softcap, window=window, **extra)
    y, ptr = cases.normal(g, sum(lengths), heads[0], width), cases.prefixes(*lengths)
    check("attend_back", y, ptr, attention, None)
    stored = StoredAttention(attention.weights(positions).contiguous(), heads[1])
    a, b = pc.ops.attend_back(y, ptr, attention), pc.ops.attend_back(y, ptr, stored)
    assert float((a - b).norm()) <= 3e-6 * float(b.norm())


@EXAMPLES
@given(
    SEEDS,
    PREFIXES,
    st.integers(-5, 5),
    st.integers(1, 70),
    st.integers(1, 40),
    st.floats(0, 1),
    FLOATS,
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_edge_scores(
    seed: int,
    lengths: list[int],
    longer: int,
    width: int,
    size: int,
    density: float,
    dtype: torch.dtype,
    gap: int,
    skip: int,
) -> None:
    g = cases.generator(seed)
    positions = max(max(lengths, default=0) + longer, 0)  # fewer than the longest prefix, or more
    features = drawn_features(g, positions, size, density)
    w_dec = strided(cases.normal(g, size, width, dtype=dtype), gap, skip)
    gradient = strided(cases.normal(g, sum(lengths), width), gap, skip)
    out = strided(cases.normal(g, len(lengths), features.count), gap, skip)
    check("edge_scores", gradient, cases.prefixes(*lengths), features, w_dec, out)


@EXAMPLES
@given(
    SEEDS,
    st.integers(0, 4),
    st.integers(0, 5),
    st.integers(0, 20),
    st.integers(0, 40),
    st.floats(0, 1),
    st.integers(0, 5),
    st.integers(0, 3),
    st.integers(0, 9),
)
def test_influence(
    seed: int, outputs: int, layers: int, per_layer: int, extra: int, density: float, gap: int, skip: int, spare: int
) -> None:
    g = cases.generator(seed)
    rows, node, weight, _ = cases.influence_case(outputs, layers, per_layer, extra)(g)
    rows *= torch.rand(rows.shape, generator=g) < density
    # Only some of the columns are expanded: the others are ends, as errors and tokens are.
    expanded = (node < 0) | (torch.rand(len(node), generator=g) < 0.7)
    rows, node, weight = rows[expanded], node[expanded].contiguous(), weight[expanded].contiguous()
    check("influence", strided(rows, gap, skip), node, weight, None)
    buffer, order = cases.shuffled_rows(g, rows, spare)
    check("influence", strided(buffer, gap, skip), node, weight, order)
