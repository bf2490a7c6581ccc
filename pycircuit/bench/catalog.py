"""Table of benchmarks: op x shape x variant, with the targets of each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from pycircuit.ops.dispatch import encode_screens

from . import inputs
from .inputs import Inputs
from .shapes import SHAPES

BF16 = torch.bfloat16
MATRIX, READ, MEMORY = "matrix rate", "read rate", "memory"


@dataclass(frozen=True)
class Target:
    """Bound on a figure of a row.

    of: a peer (its time over ours), a measured rate (a share of it), or MEMORY (scratch of encode as a share of
    positions x features floats).
    """

    of: str
    least: float | None = None
    most: float | None = None

    def met(self, got: float) -> bool:
        return (self.least is None or got >= self.least) and (self.most is None or got <= self.most)

    def __str__(self) -> str:
        bound = f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"
        return f"{self.of} {bound}"


@dataclass(frozen=True)
class Row:
    """One benchmark.

    build: draws the inputs; rotate: read weights from memory, not from a cache that the last call warmed; single: cheap
    enough to measure with one thread too; needs: bytes of memory that it takes.
    """

    op: str
    shape: str
    variant: str
    build: Callable[[torch.Generator], Inputs]
    targets: tuple[Target, ...] = ()
    rotate: bool = True
    single: bool = False
    quick: bool = False
    needs: float = 2e9

    @property
    def name(self) -> str:
        return f"{self.op}/{self.shape}/{self.variant}"


def _encode() -> list[Row]:
    scratch = Target(MEMORY, most=0.2 if encode_screens() else 0.05)  # with x and w_enc rounded to bfloat16
    fp32 = (Target("reference", 1.3), Target("product", round(1 / 1.05, 3)), scratch)
    bf16 = (Target("reference fp32", 3.0),)
    rows = []
    for name in ("small", "gemma2b"):
        for rule in ("jumprelu", "topk"):
            build = partial(inputs.encode, shape=SHAPES[name], positions=64, rule=rule)
            small = name == "small"
            rows.append(Row("encode", name, rule, build, fp32, single=small, quick=small))
            rows.append(Row("encode", name, f"{rule}-bf16", partial(build, dtype=BF16), bf16, single=small))
    return rows


def _decode() -> list[Row]:
    def build(name: str, slots: int | None) -> Callable[..., Inputs]:
        return partial(inputs.decode, shape=SHAPES[name], positions=64, slots=slots)

    clt = (Target("reference", 12), Target("embedding_bag", 1.25), Target(READ, 0.8))
    bf16 = (Target("same fp32", 1.7),)
    layers = build("gemma2b", 13)
    return [
        Row("decode", "small", "plt", build("small", None), single=True, quick=True),
        Row("decode", "small", "clt8", build("small", 8), single=True),
        Row("decode", "gemma2b", "plt", build("gemma2b", None), single=True),
        Row("decode", "gemma2b", "clt13", layers, clt, single=True, needs=8e9),
        Row("decode", "gemma2b", "clt13-bf16", partial(layers, dtype=BF16), bf16, needs=9e9),
    ]


def _attend_back() -> list[Row]:
    rows = []
    for name in ("small", "medium", "long"):
        shape = SHAPES[name]
        rate = (Target(MATRIX, 0.6),) if shape.positions >= 256 else ()
        for targets in (16, 64, 256):
            for prefix in ("ragged", "full"):
                for form in ("stored", "recomputed"):
                    build = partial(
                        inputs.attend_back, shape=shape, targets=targets, full=prefix == "full", stored=form == "stored"
                    )
                    once = targets == 64 and prefix == "ragged" and name != "long"
                    size = 4 * targets * shape.positions * shape.width
                    rows.append(
                        Row(
                            "attend_back",
                            name,
                            f"b{targets}-{prefix}-{form}",
                            build,
                            (Target("reference", 2), *rate),
                            rotate=False,
                            single=once,
                            quick=once and name == "small",
                            needs=1e9 + 10 * size,
                        )
                    )
    return rows


def _edge_scores() -> list[Row]:
    goals = (Target("reference", 3), Target(MATRIX, 0.5))
    rows = []
    for name in ("small", "medium"):
        for targets in (16, 64, 256):
            for kind, slots in (("plt", None), ("clt", SHAPES[name].layers)):
                build = partial(inputs.edge_scores, shape=SHAPES[name], targets=targets, slots=slots)
                once = targets == 64
                row = Row("edge_scores", name, f"b{targets}-{kind}", build, goals, single=once, quick=once)
                rows.append(row)
    return rows


def _influence() -> list[Row]:
    goals = (Target("reference", 15), Target(READ, 0.7))
    small = partial(inputs.influence, layers=8, per_layer=2_048, count=1_024, columns=16_960)
    large = partial(inputs.influence, layers=26, per_layer=3_700, count=7_500, columns=100_000)
    return [
        Row("influence", "small", "k1024", small, single=True, quick=True),
        Row("influence", "gemma2b", "k7500", large, goals, rotate=False, needs=9e9),
    ]


ROWS: tuple[Row, ...] = (*_encode(), *_decode(), *_attend_back(), *_edge_scores(), *_influence())


def select(op: str | None = None, shape: str | None = None, name: str | None = None, quick: bool = False) -> list[Row]:
    """Rows of an op, of a shape, with `name` in their name, or the quick ones; ValueError where none fits."""
    rows = [
        row
        for row in ROWS
        if op in (None, row.op) and shape in (None, row.shape) and (name or "") in row.name and (row.quick or not quick)
    ]
    if not rows:
        wanted = ", ".join(f"{k} {v!r}" for k, v in {"op": op, "shape": shape, "row": name}.items() if v)
        wanted += " among the quick ones" * quick
        ops, shapes = (", ".join(sorted({getattr(r, k) for r in ROWS})) for k in ("op", "shape"))
        raise ValueError(f"bench: {wanted} must name a row, got none; ops are {ops}; shapes are {shapes}")
    return rows
