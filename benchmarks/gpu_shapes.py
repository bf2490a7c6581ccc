"""Inputs of every op at the GPU shapes (gemma2b and gemma2b-long), with what each must compute and move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import pycircuit as pc
from pycircuit.ops.attention import Attention, RecomputedAttention, StoredAttention

FLOAT, BRIEF = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Size:
    """width, features a layer, active a position, layers, heads, kv heads, head width; lengths of the prompts."""

    width: int
    features: int
    active: int
    layers: int
    heads: int
    groups: int
    head: int
    prompts: tuple[int, ...]
    targets: tuple[int, ...]  # at each prompt length
    rows: int
    columns: int


GEMMA2B = Size(2304, 16384, 60, 26, 8, 4, 256, (128, 2300, 8192), (256, 32, 8), 7500, 100_000)
COMPILED = replace(GEMMA2B, prompts=(128, 2300), targets=(256, 32), rows=512)  # what compiles the same, in less memory
TINY = Size(48, 160, 6, 4, 4, 2, 16, (5, 20), (4, 2), 20, 150)


@dataclass(frozen=True)
class Item:
    """One thing to time: the op's arguments, its useful operations at which matrix rate, and its least bytes."""

    op: str
    shape: str
    arguments: Callable[[], tuple[Any, ...]]
    operations: float
    bytes: float
    rate: str = "fp32"
    library: Callable[[], Any] | None = None

    def shape_class(self, module: ModuleType) -> str:
        args = self.arguments()
        if self.op == "encode":
            return module.shape_class(args[0], args[1])
        if self.op == "edge_scores":
            return module.shape_class(args[2].positions, len(args[1]) - 1, args[3])
        return module.shape_class(args[{"decode": 1, "attend_back": 2, "influence": 0}[self.op]])


def _names(size: Size) -> list[str]:
    short, long = ("tiny", "tiny") if size is TINY else ("gemma2b", "gemma2b-long")
    return [short, *[long] * (len(size.prompts) - 1)]


def _rate(dtype: torch.dtype) -> str:
    return "bf16" if dtype == BRIEF else "fp32"


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def features(size: Size, positions: int, device: str) -> pc.SparseFeatures:
    """Exactly `active` features a position, chosen evenly."""
    chosen = torch.rand(positions, size.features, device=device).topk(size.active).indices.sort(1).values
    row_ptr = torch.arange(positions + 1, device=device) * size.active
    return pc.SparseFeatures(row_ptr, chosen.flatten(), torch.rand(chosen.numel(), device=device) + 0.5)


def ragged(targets: int, positions: int, device: str) -> Tensor:
    """Prefixes of all lengths from 1 to positions, rising: [targets + 1]."""
    lengths = torch.linspace(1, positions, targets, device=device).long()
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _encode(size: Size, device: str) -> Iterator[Item]:
    d, f = size.width, size.features
    theta = float(torch.special.ndtri(torch.tensor(1 - size.active / f, dtype=torch.float64)))
    jump = pc.JumpReLU(torch.full((f,), theta, device=device))
    for name, p in zip(_names(size), size.prompts, strict=True):
        x, b = torch.randn(p, d, device=device), torch.randn(f, device=device) * 1e-3
        for dtype, rule in ((FLOAT, jump), (FLOAT, pc.TopK(size.active)), (BRIEF, jump), (BRIEF, pc.TopK(size.active))):
            w = (torch.randn(f, d, device=device) / d**0.5).to(dtype)
            moved = w.nbytes + x.nbytes + 16 * p * size.active
            like = x.to(dtype)
            yield Item(
                "encode",
                f"{name} P {p} {_label(dtype)} {type(rule).__name__}",
                lambda x=x, w=w, b=b, r=rule: (x, w, b, r, 1),
                2.0 * p * f * d,
                moved,
                _rate(dtype),
                lambda x=like, w=w: x @ w.T,
            )


def _embedding_bag(active: pc.SparseFeatures, w: Tensor) -> Tensor:
    """The library's own sum of weighted rows."""
    return torch.nn.functional.embedding_bag(
        active.index, w, active.row_ptr[:-1], mode="sum", per_sample_weights=active.value
    )


def _decode(size: Size, device: str) -> Iterator[Item]:
    name, p, d = _names(size)[0], size.prompts[0], size.width
    active = features(size, p, device)
    for slots in (1, size.layers // 2):
        for dtype in (FLOAT, BRIEF):
            w = torch.randn(size.features, slots, d, device=device, dtype=dtype) / (d * size.active) ** 0.5
            read = active.index.unique().numel() * slots * d * w.itemsize
            bag = partial(_embedding_bag, active, w.flatten(1)) if dtype == FLOAT else None
            yield Item(
                "decode",
                f"{name} P {p} slots {slots} {_label(dtype)}",
                lambda w=w: (active, w, None),
                2.0 * active.count * slots * d,
                read + 4 * p * slots * d,
                library=bag,
            )


def _attentions(size: Size, p: int, device: str) -> Iterator[tuple[str, Attention, float, float]]:
    """(name, attention, operations to remake it, bytes to read it)."""
    query = torch.randn(size.heads, p, size.head, device=device)
    key = torch.randn(size.groups, p, size.head, device=device)
    draft = RecomputedAttention(query, key, torch.zeros(size.heads, p, device=device), size.head**-0.5, 50.0)
    pattern = draft.weights(p)
    total = pattern.sum(-1, keepdim=True)
    if p < 4096:
        yield "stored", StoredAttention(pattern / total, size.groups), 0.0, 2.0 * size.heads * p * p
    for dtype in (FLOAT, BRIEF):
        q, k = query.to(dtype), key.to(dtype)
        lse = total[..., 0].log()
        if dtype == BRIEF:
            lse = RecomputedAttention(q, k, torch.zeros_like(lse), size.head**-0.5, 50.0).weights(p).sum(-1).log()
        attention = RecomputedAttention(q, k, lse, size.head**-0.5, 50.0, 4096)
        yield f"recomputed {_label(dtype)}", attention, float(p * (p + 1) * size.heads * size.head), q.nbytes + k.nbytes


def _attend_back(size: Size, device: str) -> Iterator[Item]:
    for name, p, targets in zip(_names(size), size.prompts, size.targets, strict=True):
        prefix_ptr = ragged(targets, p, device)
        y = torch.randn(int(prefix_ptr[-1]), size.heads, size.head, device=device)
        lengths = prefix_ptr.diff().double()
        useful = float((lengths * (lengths + 1)).sum()) * size.heads * size.head
        for kind, attention, remake, read in _attentions(size, p, device):
            yield Item(
                "attend_back",
                f"{name} P {p} B {targets} {kind}",
                lambda y=y, q=prefix_ptr, h=attention: (y, q, h, None),
                useful + remake,
                y.nbytes * (1 + size.groups / size.heads) + read,
            )


def _edge_scores(size: Size, device: str) -> Iterator[Item]:
    for name, p, targets in list(zip(_names(size), size.prompts, size.targets, strict=True))[:2]:
        prefix_ptr, active = ragged(targets, p, device), features(size, p, device)
        gradient = torch.randn(int(prefix_ptr[-1]), size.width, device=device)
        pairs = float(prefix_ptr[-1]) * size.active
        for dtype in (FLOAT, BRIEF):
            w = torch.randn(size.features, size.width, device=device).to(dtype)
            moved = gradient.nbytes + active.index.unique().numel() * w.shape[1] * w.itemsize + 8 * pairs
            yield Item(
                "edge_scores",
                f"{name} P {p} T {targets} {_label(dtype)}",
                lambda q=prefix_ptr, f=active, g=gradient, w=w, t=targets: (
                    g,
                    q,
                    f,
                    w,
                    torch.zeros(t, f.count, device=device),
                ),
                2.0 * pairs * size.width,
                moved,
                _rate(dtype),
            )


def _influence(size: Size, device: str) -> Iterator[Item]:
    count, columns, outputs = size.rows, size.columns, 10
    inner = count - outputs
    per_layer = -(-inner // size.layers)
    layer = torch.arange(inner, device=device) // per_layer
    order = torch.argsort(layer, descending=True, stable=True)
    node = torch.cat([torch.full((outputs,), -1, device=device), order])
    rows = torch.randn(count, columns, device=device)
    for r in range(outputs, count, 256):  # no edge from a node's own layer or above it
        below = node[r : r + 256]
        rows[r : r + 256, :inner].masked_fill_(layer[None, :] >= layer[below][:, None], 0)
    weight = torch.zeros(count, device=device)
    weight[:outputs] = 1 / outputs
    shape = f"{_names(size)[0]} K {count} columns {columns}"
    yield Item("influence", shape, lambda: (rows, node, weight, None), 2.0 * count * columns, rows.nbytes + 4 * columns)


def items(op: str, device: str, size: Size | None = None) -> Iterator[Item]:
    """An op's inputs, by default gemma2b's on a card and tiny ones elsewhere; made when they are asked for."""
    size = size or (GEMMA2B if device == "cuda" else TINY)
    torch.manual_seed(0)
    builders = {
        "encode": _encode,
        "decode": _decode,
        "attend_back": _attend_back,
        "edge_scores": _edge_scores,
        "influence": _influence,
    }
    yield from builders[op](size, device)
