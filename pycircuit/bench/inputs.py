"""Realistic inputs of each op at a shape: arguments, float64 truth, least work, and the peers to beat."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pycircuit.ops import cases
from pycircuit.ops.activations import Activation, JumpReLU, TopK
from pycircuit.ops.attention import Attention, RecomputedAttention, StoredAttention
from pycircuit.ops.dispatch import encode_screens
from pycircuit.ops.features import SparseFeatures

from .shapes import Shape

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Peer:
    """Call to compare with: a function of the arguments, or the name of an implementation of the same op.

    "same" is the implementation under test, with other `args`. `result` converts its output to that of the op.
    """

    run: Callable[..., Any] | str
    args: Arguments | None = None
    result: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Inputs:
    """Arguments of a row and the least operations and bytes of any implementation.

    bfloat16: the numbers that it multiplies are of this type; encode's are where the processor multiplies them.
    """

    args: Arguments
    operations: float
    bytes: float
    error: Callable[[Any], float]
    peers: dict[str, Peer] = field(default_factory=dict)
    bfloat16: bool = False


def _against(op: str, args: Arguments) -> Callable[[Any], float]:
    truth = cases.exact(op, args)
    return lambda got: cases.error(op, got, truth, args)


def _bytes(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def encode(g: torch.Generator, shape: Shape, positions: int, rule: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """x: [positions, width], w_enc: [features, width]; the rule leaves `active` features a position."""
    width, size = shape.width, shape.features
    x, b_enc = cases.normal(g, positions, width), cases.normal(g, size) / 10
    wide = cases.normal(g, size, width) / width**0.5
    w_enc = wide.to(dtype)
    activation: Activation = TopK(shape.active)
    if rule == "jumprelu":
        pre = torch.addmm(b_enc, x, w_enc.float().T).flatten()
        nearest = pre.topk(positions * shape.active + 1).values[-2:]
        activation = JumpReLU(nearest.mean().expand(size).contiguous())
    args = (x, w_enc, b_enc, activation, 0)
    peers = {"reference": Peer("reference")}
    if dtype == torch.float32:
        peers["product"] = Peer(_product)
    else:
        peers["reference fp32"] = Peer("reference", (x, wide, b_enc, activation, 0))
        peers["product bf16"] = Peer(_product, (x.to(dtype), w_enc))
    out = positions * shape.active * 12
    return Inputs(
        args,
        operations=2.0 * positions * width * size,
        bytes=_bytes(x, w_enc, b_enc) + 4 * size * (rule == "jumprelu") + out,
        error=_against("encode", args),
        peers=peers,
        bfloat16=dtype == torch.bfloat16 or encode_screens(),
    )


def _product(x: Tensor, w_enc: Tensor, *_: Any) -> Tensor:
    return torch.matmul(x, w_enc.T)


def _distinct(g: torch.Generator, positions: int, size: int, active: int) -> SparseFeatures:
    """Features with `active` at every position, none twice where `size` allows it, so that no row is in cache."""
    draws = -(-positions * active // size)
    index = torch.cat([torch.randperm(size, generator=g) for _ in range(draws)])[: positions * active]
    index = index.view(positions, active).sort(1).values.flatten()
    value = torch.rand(positions * active, generator=g) + 0.5
    return SparseFeatures(torch.arange(0, positions * active + 1, active), index, value)


def decode(
    g: torch.Generator, shape: Shape, positions: int, slots: int | None, dtype: torch.dtype = torch.float32
) -> Inputs:
    """w_dec: [features, width] or [features, slots, width]."""
    features = _distinct(g, positions, shape.features, shape.active)
    tail = (shape.width,) if slots is None else (slots, shape.width)
    wide = cases.normal(g, shape.features, *tail)
    wide /= (shape.width * shape.active) ** 0.5
    w_dec = wide.to(dtype)
    distinct, compact = features.index.unique(return_inverse=True)
    truth_args = (SparseFeatures(features.row_ptr, compact, features.value), w_dec[distinct], None)
    peers = {"reference": Peer("reference")}
    if dtype == torch.float32:
        peers["embedding_bag"] = Peer(_embedding_bag, result=lambda out: out.movedim(0, -2))
    else:
        peers["same fp32"] = Peer("same", (features, wide, None))
    row = math.prod(tail)
    return Inputs(
        (features, w_dec, None),
        operations=2.0 * features.count * row,
        bytes=len(distinct) * row * w_dec.element_size() + positions * row * 4.0 + features.count * 12,
        error=_against("decode", truth_args),
        peers=peers,
        bfloat16=dtype == torch.bfloat16,
    )


def _embedding_bag(features: SparseFeatures, w_dec: Tensor, _: None) -> Tensor:
    flat = w_dec.flatten(1)
    out = embedding_bag(
        features.index, flat, features.row_ptr[:-1], mode="sum", per_sample_weights=features.value.to(flat.dtype)
    )
    return out.view(features.positions, *w_dec.shape[1:])


def _prefixes(targets: int, positions: int, full: bool) -> Tensor:
    """Prefixes of targets spread evenly over the positions, ascending as in the sweep, or all of full length."""
    if full:
        return torch.arange(targets + 1) * positions
    lengths = torch.linspace(1, positions, targets).round().long()
    return cases.prefixes(*lengths.tolist())


def _few_targets(prefix_ptr: Tensor, most: int = 6) -> tuple[Tensor, Tensor]:
    """Choose a few targets, first and last among them: (their rows, their own prefix_ptr)."""
    targets = len(prefix_ptr) - 1
    chosen = torch.linspace(0, targets - 1, min(most, targets)).round().long().unique()
    spans = [torch.arange(int(prefix_ptr[t]), int(prefix_ptr[t + 1])) for t in chosen]
    return torch.cat(spans), cases.prefixes(*(len(s) for s in spans))


def attend_back(g: torch.Generator, shape: Shape, targets: int, full: bool, stored: bool) -> Inputs:
    """y: [rows, heads, head width]; useful operations are those at or below the diagonal of each prefix."""
    heads, groups, width, positions = shape.heads, shape.kv_heads, shape.head_width, shape.positions
    prefix_ptr = _prefixes(targets, positions, full)
    lengths = prefix_ptr.diff().double()
    longest = float(lengths.max())
    triangle = longest * (longest + 1) / 2
    attention: Attention = cases.recomputed(g, heads, groups, positions, width)
    operations = float((heads * lengths * (lengths + 1) * width).sum())
    if stored:
        attention = StoredAttention(attention.weights(positions).contiguous(), groups)
        frozen = heads * triangle * 4
    else:
        assert isinstance(attention, RecomputedAttention)
        operations += 2 * heads * triangle * width
        frozen = _bytes(attention.query, attention.key, attention.log_sum_exp)
    y = cases.normal(g, int(prefix_ptr[-1]), heads, width)
    out = torch.zeros(len(y), groups, width)  # the sweep reuses its buffers
    rows, few = _few_targets(prefix_ptr)
    check = _against("attend_back", (y[rows], few, attention, None))
    return Inputs(
        (y, prefix_ptr, attention, out),
        operations=operations,
        bytes=_bytes(y) * (1 + groups / heads) + frozen,
        error=lambda got: check(got[rows]),
        peers={"reference": Peer("reference")},
    )


def edge_scores(g: torch.Generator, shape: Shape, targets: int, slots: int | None) -> Inputs:
    """One layer's active features against a batch of targets; a CLT's w_dec is one slot of [features, slots, width]."""
    features = _distinct(g, shape.positions, shape.features, shape.active)
    prefix_ptr = _prefixes(targets, shape.positions, full=False)
    w_dec = cases.normal(g, shape.features, slots or 1, shape.width) / (shape.width * shape.active) ** 0.5
    w_dec = w_dec[:, (slots or 1) // 2] if slots else w_dec[:, 0]
    gradient = cases.normal(g, int(prefix_ptr[-1]), shape.width)
    out = torch.zeros(targets, features.count)
    entries = float(prefix_ptr[-1]) * shape.active
    args = (gradient, prefix_ptr, features, w_dec, out)
    distinct = len(features.index.unique())
    return Inputs(
        args,
        operations=2 * entries * shape.width,
        bytes=_bytes(gradient) + distinct * shape.width * 4 + 8 * entries + 12 * features.count,
        error=_against("edge_scores", args),
        peers={"reference": Peer("reference")},
    )


def influence(g: torch.Generator, layers: int, per_layer: int, count: int, columns: int) -> Inputs:
    """rows: [count, columns], each reaching only the layers below its own, and the errors and tokens."""
    rows_per_layer = (count - 1) // layers
    outputs = count - rows_per_layer * layers
    rows = torch.empty(count, columns).normal_(generator=g)
    node, blocks = torch.full((count,), -1), [slice(0, outputs)]
    for layer in reversed(range(layers)):
        block = slice(blocks[-1].stop, blocks[-1].stop + rows_per_layer)
        chosen = torch.randperm(per_layer, generator=g)[:rows_per_layer].sort().values
        node[block] = layer * per_layer + chosen
        rows[block, layer * per_layer : layers * per_layer] = 0
        blocks.append(block)
    weight = torch.zeros(count)
    weight[:outputs] = torch.rand(outputs, generator=g) + 0.1
    weight /= weight.sum()
    truth = _layered_influence(rows, node, weight, blocks)
    return Inputs(
        (rows, node, weight, None),
        operations=3.0 * rows.numel(),
        bytes=_bytes(rows) + 4 * columns,
        error=lambda got: float((got.double() - truth).norm() / truth.norm()),
        peers={"reference": Peer("reference")},
    )


def _layered_influence(rows: Tensor, node: Tensor, weight: Tensor, blocks: list[slice]) -> Tensor:
    """Influence in float64, a layer at a time: the full matrix in float64 would not fit."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in blocks:
        share = rows[block].double().abs()
        share /= share.sum(1, keepdim=True)
        entering = weight[block].double() + torch.where(node[block] >= 0, total[node[block].clamp_min(0)], 0)
        total += entering @ share
    return total
