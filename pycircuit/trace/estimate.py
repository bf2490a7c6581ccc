"""Memory and time of a trace before any of it is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops import SparseFeatures
from pycircuit.ops.torch_settings import full_float32
from pycircuit.transcoders.lazy import cached_row_bytes

from .columns import Columns
from .memory_model import Work, round_of
from .memory_plan import Bound, Plan, decide, readable
from .precision import FLOAT32, Arithmetic, Precision, Products, arithmetic_of
from .targets import check

_SAMPLE = 256  # positions that are run to see how many features are active
_ROOM = 1.25  # for prompts whose later positions are busier than the sample
_SHARE = 0.5  # of the matrix rate that a trace reaches
_TRACE_CALLS, _TILE_CALLS, _ROW_CALLS = 24, 9, 0.13  # of a small op: of a trace; of a tile and a row, in each layer
_MOMENT = 0.01  # seconds of each measurement


@dataclass(frozen=True)
class Estimate:
    """features: how many are active, counted on the first `sampled` positions; rows, columns: of the edges.

    plan: how the trace would run, with the bytes of its largest phase by part; operations: floating-point, of all of
    it; seconds: of the forward, of the sweep's products and of its calls at the rates measured now, within a factor
    of two.
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


@full_float32()
def estimate(
    model: ReplacementModel,
    prompt: str | Sequence[int] | Tensor,
    max_features: int | None = None,
    memory: str | int | None = None,
    max_targets: int = 10,
    *,
    precision: Precision = "float32",
) -> Estimate:
    """What `attribute` would need with these arguments. Runs the model on the first positions of the prompt only.

    MemoryBoundError, as `attribute` would raise it, for a prompt that cannot fit.
    """
    check_model("estimate", model)
    arithmetic = arithmetic_of("estimate", precision, model.device, model.dtype)
    max_features, max_targets, _ = check(max_features, 1.0, max_targets, None)
    bound, ids = Bound.of(memory, model.device), model.tokens(prompt)
    seen = sample(model, ids, max_features, max_targets, arithmetic)
    plan = decide(model, seen.work, bound)
    forward, swept = _operations(model, len(ids), seen)
    seconds = seen.seconds + swept / (_SHARE * _rate(model, arithmetic)) + _calls(plan, seen) * _call_seconds(model)
    operations = forward + swept
    sampled, work = min(len(ids), _SAMPLE), seen.work
    return Estimate(len(ids), sampled, work.features, work.rows, work.columns, plan, operations, seconds)


@dataclass(frozen=True, eq=False)
class Sample:
    """Features of the first positions of a prompt, going on as they began.

    layer, position: of every feature; sizes: how many columns each sees; seconds: of the forward and the encoders.
    """

    work: Work
    seconds: float
    layer: Tensor
    position: Tensor
    sizes: Tensor


def sample(
    model: ReplacementModel, ids: Tensor, max_features: int | None, outputs: int, arithmetic: Arithmetic = FLOAT32
) -> Sample:
    """What is to be expected of a prompt. outputs: how many targets it has."""
    begin = time.perf_counter()
    found = model.activations([ids[:_SAMPLE]])[0]
    seconds = (time.perf_counter() - begin) * len(ids) / min(len(ids), _SAMPLE)
    columns = _columns(model, ids, found)
    layer, position = places(columns)
    sizes = columns.cone_sizes(layer, position)
    wanted = columns.features if max_features is None else min(max_features, columns.features)
    ends = columns.cone_sizes(*(torch.full((outputs,), at, device="cpu") for at in (model.depth, len(ids) - 1)))
    batch = max(outputs, round_of(wanted, columns.features, None))
    work = Work(
        positions=len(ids),
        features=columns.features,
        rows=wanted + outputs,
        entries=int(sizes.topk(wanted).values.sum()) + int(ends.sum()),
        layers=model.depth,
        ranked=0 < wanted < columns.features,
        batch=batch,
        decoders=cached_row_bytes(
            model.transcoders.w_dec, found, columns.features / max(1, sum(f.count for f in found))
        ),
        busiest=columns.busiest,
        arithmetic=arithmetic,
    )
    return Sample(work, seconds, layer, position, sizes)


def _columns(model: ReplacementModel, ids: Tensor, found: Sequence[SparseFeatures]) -> Columns:
    """Of the whole prompt, the sample's counts going on at their mean with some room."""
    before = torch.stack([f.row_ptr for f in found]).cpu().numpy()
    left = len(ids) - before.shape[1] + 1
    seen = max(1, before.shape[1] - 1 - model.ignore_positions)
    mean = _ROOM * before[:, -1:] / seen
    later = before[:, -1:] + np.ceil(mean * np.arange(1, left + 1))
    return Columns(np.concatenate([before, later.astype(np.int64)], 1), len(ids))


def places(columns: Columns) -> tuple[Tensor, Tensor]:
    """Layer and position of every feature."""
    here = np.diff(columns.before, axis=1)
    layer, position = (a.ravel() for a in np.indices(here.shape))
    return torch.from_numpy(layer.repeat(here.ravel())), torch.from_numpy(position.repeat(here.ravel()))


def _operations(model: ReplacementModel, positions: int, seen: Sample) -> tuple[float, float]:
    """Of forward and encoders, and of the sweep of `rows` average features: projections, attention, scores."""
    width, first = model.width, model.weights.layers[0]
    inner = first.w_o.shape[1] + first.w_v.shape[0]
    weights = sum(p.numel() for p in model.hf_model.parameters())
    encoders = sum(model.transcoders.size(at) * width for at in range(model.depth))
    longest = seen.position + 1
    passed = (seen.layer - 1).clamp_min(0).double() * longest  # positions projected down and up again
    each = passed * (2 * width * inner + first.w_o.shape[1] * longest) + 2.0 * width * seen.sizes
    return 2.0 * positions * (weights + encoders), seen.work.rows * float(each.mean() if len(each) else 0.0)


def _calls(plan: Plan, seen: Sample) -> float:
    """What does not grow with a tensor's size, in calls of a small op: of the trace, its tiles and its rows."""
    work, mean = seen.work, float((seen.position + 1).double().mean()) if len(seen.position) else 1.0
    rounds = 1 + ceil(work.rows / max(1, work.batch)) if work.rows else 1
    together = max(1.0, plan.targets * work.positions / mean)
    tiles = max(rounds, ceil(work.rows / together))
    return _TRACE_CALLS + work.layers * (tiles * _TILE_CALLS + work.rows * _ROW_CALLS)


def _call_seconds(model: ReplacementModel) -> float:
    """Time of an op on a few numbers, measured now: checks, dispatch, and the way into the kernel."""
    of: dict[str, Any] = {"device": model.device}
    rows, out = torch.ones(4, 8, dtype=model.dtype, **of), torch.zeros(1, 4, dtype=model.dtype, **of)
    features = SparseFeatures(torch.arange(5, **of), torch.arange(4, **of), rows[:, 0].contiguous())
    prefix_ptr = torch.tensor([0, 4], **of)
    return _mean_seconds(lambda: float(ops.edge_scores(rows, prefix_ptr, features, rows, out)[0, 0]))


def _rate(model: ReplacementModel, arithmetic: Arithmetic) -> float:
    """Operations a second of a product as the sweep does them, measured now."""
    rows, weight = (torch.ones(n, 1024, dtype=model.dtype, device=model.device) for n in (512, 1024))
    products, weight = Products(arithmetic), weight.T
    return 2.0 * 512 * 1024 * 1024 / _mean_seconds(lambda: float(products.project(rows, weight)[0, 0]))


def _mean_seconds(call: Callable[[], float]) -> float:
    """Mean over a moment rather than the best call: other programs slow the trace as they slow this."""
    call()
    begin, count, spent = time.perf_counter(), 0, 0.0
    while spent < _MOMENT:
        call()
        count, spent = count + 1, time.perf_counter() - begin
    return spent / count
