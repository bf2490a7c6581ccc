"""Memory and time of a trace before any of it is spent."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops import SparseFeatures
from pycircuit.ops.torch_settings import full_float32
from pycircuit.progress import Progress, Report
from pycircuit.transcoders.lazy import cached_row_bytes

from .checkpoint import Checkpoint
from .columns import Columns
from .memory_model import TraceSize, trace_size
from .memory_plan import Bound, Fixed, MemoryPlan, plan_memory, readable
from .precision import Arithmetic, Precision, Products
from .targets import TargetList
from .trace_options import TraceOptions

_SAMPLE = 256  # positions that are run to count active features
_MARGIN = 1.25  # for later positions with more features than the sample
_SHARE = 0.5  # of the rate of matrix products that a trace reaches
_TRACE_CALLS, _TILE_CALLS, _ROW_CALLS = 24, 9, 0.13  # of small ops: of a trace; of a tile and of a row, a layer
_MOMENT = 0.01  # seconds of each measurement


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a trace.

    features: active ones, extrapolated from the first `sampled` positions; rows, columns: of the edges; plan: the way
    the trace would run, with the bytes of its largest phase by purpose; operations: floating-point, of all phases;
    seconds: of the forward, of the sweep's products and of its calls at the rates measured now, within a factor of two.
    """

    positions: int
    sampled: int
    features: int
    rows: int
    columns: int
    plan: MemoryPlan
    operations: float
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes beside the model, at the most."""
        return self.plan.total

    def __str__(self) -> str:
        counted = "counted" if self.sampled == self.positions else f"from the first {self.sampled} positions"
        cut = "" if self.plan.keep is None else f", the {self.plan.keep} largest entries of each"
        patterns = "stored" if self.plan.stored else "recomputed"
        lines = [
            f"{self.positions} positions, about {self.features} active features ({counted})",
            f"{self.rows} rows of {self.columns} columns{cut}; attention {patterns}",
            f"memory  {readable(self.bytes)} of {readable(self.plan.memory)}: "
            + ", ".join(f"{name} {readable(size)}" for name, size in self.plan.needs.items()),
            f"time    about {_short(self.seconds)} s for {_short(self.operations / 1e9)} GFLOP",
        ]
        return "\n".join(lines)


def _short(value: float) -> str:
    """Format a number: one figure below one, none after the point from ten on."""
    return f"{value:.1g}" if value < 1 else f"{value:.{int(value < 10)}f}"


@full_float32()
def estimate(
    model: ReplacementModel,
    prompt: str | Sequence[int] | Tensor,
    *,
    targets: TargetList = None,
    max_features: int | None = None,
    position: int | Sequence[int] = -1,
    probability: float = 0.95,
    max_targets: int = 10,
    precision: Precision = "float32",
    memory: str | int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Report = True,
    round_size: int | None = None,
) -> Estimate:
    """Return the memory and time that `attribute` would need with these arguments.

    The model runs on the first positions of the prompt only, so targets are counted as the most that there can be.
    MemoryBoundError, as `attribute` would raise it, for a prompt that cannot fit.
    """
    check_model("estimate", model)
    options = TraceOptions.checked(
        "estimate", model, targets, max_features, position, probability, max_targets, precision, round_size
    )
    bound, ids = Bound.of(memory, model.device), model.tokens(prompt)
    with closing(Progress(progress)) as progress_line:
        progress_line.step("estimate", 0, min(len(ids), _SAMPLE), "positions")
        sample = sample_prompt(model, ids, options, Checkpoint.largest(checkpoint))
        plan = plan_memory(model, sample.trace, bound, Fixed(rows=Checkpoint.planned(checkpoint)))
        forward, sweep = _operations(model, len(ids), sample)
        sweep_seconds = sweep / (_SHARE * _rate(model, options.arithmetic))
        seconds = sample.seconds + sweep_seconds + _calls(plan, sample) * _call_seconds(model)
    trace = sample.trace
    sampled = min(len(ids), _SAMPLE)
    return Estimate(len(ids), sampled, trace.features, trace.rows, trace.columns, plan, forward + sweep, seconds)


@dataclass(frozen=True, eq=False)
class Sample:
    """Features of a prompt, extrapolated from its first positions.

    layer, position: of every feature; sizes: columns that each sees; seconds: of the forward and the encoders.
    """

    trace: TraceSize
    seconds: float
    layer: Tensor
    position: Tensor
    sizes: Tensor


def sample_prompt(
    model: ReplacementModel, ids: Tensor, options: TraceOptions, stored_bytes: int | None = None
) -> Sample:
    """Run the first positions of a prompt and extrapolate. stored_bytes: of a checkpoint's largest file."""
    begin = time.perf_counter()
    features = model.activations([ids[:_SAMPLE]])[0]
    seconds = (time.perf_counter() - begin) * len(ids) / min(len(ids), _SAMPLE)
    columns = _extrapolate(model, ids, features)
    layer, position = columns.feature_positions()
    sizes = columns.cone_sizes(layer, position)
    outputs = options.max_outputs(len(ids))
    last = torch.full((outputs,), model.depth, device="cpu"), torch.full((outputs,), len(ids) - 1, device="cpu")
    scale = columns.features / max(1, sum(f.count for f in features))
    decoders = cached_row_bytes(model.transcoders.w_dec, features, scale)
    trace = trace_size(columns, options, *last, decoders, stored_bytes)
    return Sample(trace, seconds, layer, position, sizes)


def _extrapolate(model: ReplacementModel, ids: Tensor, features: Sequence[SparseFeatures]) -> Columns:
    """Return columns of the prompt, with the sample's mean count and a margin at later positions."""
    before = torch.stack([f.row_ptr for f in features]).cpu().numpy()
    missing = len(ids) - before.shape[1] + 1
    counted = max(1, before.shape[1] - 1 - model.ignore_positions)
    mean = _MARGIN * before[:, -1:] / counted
    later = before[:, -1:] + np.ceil(mean * np.arange(1, missing + 1))
    return Columns(np.concatenate([before, later.astype(np.int64)], 1), len(ids))


def _operations(model: ReplacementModel, positions: int, sample: Sample) -> tuple[float, float]:
    """Return operations of the forward with the encoders, and of the sweep of `rows` average features."""
    width, first = model.width, model.weights.layers[0]
    inner = first.w_o.shape[1] + first.w_v.shape[0]
    weights = sum(p.numel() for p in model.hf_model.parameters())
    encoders = sum(model.transcoders.size(layer) * width for layer in range(model.depth))
    longest = sample.position + 1
    projected = (sample.layer - 1).clamp_min(0).double() * longest  # positions projected down and up again
    per_feature = projected * (2 * width * inner + first.w_o.shape[1] * longest) + 2.0 * width * sample.sizes
    return 2.0 * positions * (weights + encoders), sample.trace.rows * float(
        per_feature.mean() if len(per_feature) else 0.0
    )


def _calls(plan: MemoryPlan, sample: Sample) -> float:
    """Return the work that does not grow with a tensor's size, in calls of a small op: of trace, tiles and rows."""
    trace, mean = sample.trace, float((sample.position + 1).double().mean()) if len(sample.position) else 1.0
    rounds = 1 + ceil(trace.rows / max(1, trace.batch)) if trace.rows else 1
    tile_targets = max(1.0, plan.targets * trace.positions / mean)
    tiles = max(rounds, ceil(trace.rows / tile_targets))
    return _TRACE_CALLS + trace.layers * (tiles * _TILE_CALLS + trace.rows * _ROW_CALLS)


def _call_seconds(model: ReplacementModel) -> float:
    """Measure the seconds of an op on a few numbers: checks, dispatch, and the call of the kernel."""
    device = model.device
    rows = torch.ones(4, 8, dtype=model.dtype, device=device)
    out = torch.zeros(1, 4, dtype=model.dtype, device=device)
    row_ptr, index = torch.arange(5, device=device), torch.arange(4, device=device)
    features = SparseFeatures(row_ptr, index, rows[:, 0].contiguous())
    prefix_ptr = torch.tensor([0, 4], device=device)
    return _mean_seconds(lambda: float(ops.edge_scores(rows, prefix_ptr, features, rows, out)[0, 0]))


def _rate(model: ReplacementModel, arithmetic: Arithmetic) -> float:
    """Measure the operations a second of a matrix product of the sweep."""
    rows, weight = (torch.ones(n, 1024, dtype=model.dtype, device=model.device) for n in (512, 1024))
    products, weight = Products(arithmetic), weight.T
    return 2.0 * 512 * 1024 * 1024 / _mean_seconds(lambda: float(products.project(rows, weight)[0, 0]))


def _mean_seconds(call: Callable[[], float]) -> float:
    """Measure the mean seconds of a call, not the best: other programs slow the trace as they slow this."""
    call()
    begin, count, spent = time.perf_counter(), 0, 0.0
    while spent < _MOMENT:
        call()
        count, spent = count + 1, time.perf_counter() - begin
    return spent / count
