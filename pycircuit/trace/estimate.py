"""Memory and time of a trace before any of it is spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops import Features
from pycircuit.transcoders.lazy import kept_bytes

from .columns import Columns
from .plan import Plan, Work, decide, parse_bytes, readable
from .targets import check

_SAMPLE = 256  # positions that are run to see how many features are active
_ROOM = 1.25  # for prompts whose later positions are busier than the sample
_SHARE = 0.5  # of the matrix rate that a trace reaches


@dataclass(frozen=True)
class Estimate:
    """features: how many are active, counted on the first `sampled` positions; rows, columns: of the edges.

    plan: how the trace would run, with its bytes by part; operations: floating-point, of all of it; seconds: what
    they take at the rate of matrix products measured now, within a factor of two.
    """

    positions: int
    sampled: int
    features: int
    rows: int
    columns: int
    plan: Plan
    operations: float
    seconds: float

    @property
    def bytes(self) -> int:
        """Beside the model, at the most."""
        return self.plan.total

    def __str__(self) -> str:
        counted = "counted" if self.sampled == self.positions else f"from the first {self.sampled} positions"
        cut = "" if self.plan.keep is None else f", the {self.plan.keep} largest entries of each"
        how = "stored" if self.plan.stored else "recomputed"
        lines = [
            f"{self.positions} positions, about {self.features} active features ({counted})",
            f"{self.rows} rows of {self.columns} columns{cut}; attention {how}",
            f"memory  {readable(self.bytes)} of {readable(self.plan.memory)}: "
            + ", ".join(f"{name} {readable(size)}" for name, size in self.plan.needs.items()),
            f"time    about {_short(self.seconds)} s for {_short(self.operations / 1e9)} GFLOP",
        ]
        return "\n".join(lines)


def _short(value: float) -> str:
    """One figure below one, none after the point from ten on."""
    return f"{value:.1g}" if value < 1 else f"{value:.{int(value < 10)}f}"


def estimate(
    model: ReplacementModel,
    prompt: str | Sequence[int] | Tensor,
    max_features: int | None = None,
    memory: str | int | None = None,
    max_targets: int = 10,
) -> Estimate:
    """What `attribute` would need with these arguments. Runs the model on the first positions of the prompt only.

    MemoryBoundError, as `attribute` would raise it, for a prompt that cannot fit.
    """
    check_model("estimate", model)
    max_features, max_targets, _ = check(max_features, 1.0, max_targets, None)
    bound, ids = parse_bytes(memory), model.tokens(prompt)
    decide(model, Work(len(ids), 0, 1, 1, model.depth, False), bound)
    found = model.activations([ids[:_SAMPLE]])[0]
    columns = _columns(model, ids, found)
    total = columns.features
    wanted = total if max_features is None else min(max_features, total)
    layer, position = _places(columns)
    sizes = columns.cone_sizes(layer, position)
    ends = columns.cone_sizes(*(torch.full((max_targets,), at, device="cpu") for at in (model.depth, len(ids) - 1)))
    entries = int(sizes.topk(wanted).values.sum()) + int(ends.sum())
    ranked = 0 < wanted < total
    kept = kept_bytes(model.transcoders.w_dec, _distinct(model, columns, found))
    plan = decide(model, Work(len(ids), total, wanted + max_targets, entries, model.depth, ranked, kept), bound)
    work = _operations(model, len(ids), layer, position, sizes, wanted)
    seconds = work / (_SHARE * _rate(model))
    sampled = min(len(ids), _SAMPLE)
    return Estimate(len(ids), sampled, total, wanted + max_targets, columns.count, plan, work, seconds)


def _distinct(model: ReplacementModel, columns: Columns, found: Sequence[Features]) -> list[int]:
    """How many features of each layer are active anywhere: those of the sample, growing with the prompt at the most."""
    every = columns.before[:, -1] - columns.before[:, 0]
    counts = []
    for at, f in enumerate(found):
        here = len(f.index.unique())
        counts.append(min(model.transcoders.size(at), -(-here * int(every[at]) // max(1, f.count))))
    return counts


def _columns(model: ReplacementModel, ids: Tensor, found: Sequence[Features]) -> Columns:
    """Of the whole prompt, the sample's counts going on at their mean with some room."""
    before = torch.stack([f.row_ptr for f in found]).cpu().numpy()
    left = len(ids) - before.shape[1] + 1
    seen = max(1, before.shape[1] - 1 - model.ignore_positions)
    mean = _ROOM * before[:, -1:] / seen
    later = before[:, -1:] + np.ceil(mean * np.arange(1, left + 1))
    return Columns(np.concatenate([before, later.astype(np.int64)], 1), len(ids))


def _places(columns: Columns) -> tuple[Tensor, Tensor]:
    """Layer and position of every feature."""
    here = np.diff(columns.before, axis=1)
    layer, position = (a.ravel() for a in np.indices(here.shape))
    return torch.from_numpy(layer.repeat(here.ravel())), torch.from_numpy(position.repeat(here.ravel()))


def _operations(
    model: ReplacementModel, positions: int, layer: Tensor, position: Tensor, sizes: Tensor, rows: int
) -> float:
    """Forward, encoders, and the sweep of `rows` average features: projections, attention, scores."""
    width, first = model.width, model.weights.layers[0]
    inner = first.w_o.shape[1] + first.w_v.shape[0]
    weights = sum(p.numel() for p in model.hf_model.parameters())
    encoders = sum(model.transcoders.size(at) * width for at in range(model.depth))
    forward = 2.0 * positions * (weights + encoders)
    passed = (layer - 1).clamp_min(0).double() * (position + 1)  # positions projected down and up again
    each = passed * (2 * width * inner + first.w_o.shape[1] * (position + 1)) + 2.0 * width * sizes
    return forward + rows * float(each.mean() if len(each) else 0.0)


def _rate(model: ReplacementModel) -> float:
    """Operations a second of a product as the sweep does them, measured now."""
    a, b = (torch.ones(n, 1024, dtype=model.dtype, device=model.device) for n in (2048, 1024))
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        float((a @ b.T)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2.0 * 2048 * 1024 * 1024 / best
