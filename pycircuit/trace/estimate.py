"""Memory and time of a trace before any of it is spent."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops import SparseFeatures
from pycircuit.ops.torch_settings import full_float32
from pycircuit.progress import Progress, Report
from pycircuit.transcoders.lazy import cached_row_bytes

from .checkpoint import Checkpoint
from .columns import Columns
from .default_features import plan_default, with_default
from .memory_model import TraceSize, trace_size
from .memory_plan import Bound, Fixed, MemoryPlan, readable
from .precision import Precision
from .targets import TargetList
from .trace_cost import RowCost, call_seconds, calls, forward_operations, sweep_rate
from .trace_options import MaxFeatures, TraceOptions

_SAMPLE = 256  # positions that are run to count active features
_MARGIN = 1.25  # for later positions with more features than the sample


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
    max_features: MaxFeatures = None,
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
        options = with_default(model, options, sample.columns, checkpoint)
        fixed = Fixed(rows=Checkpoint.planned(checkpoint))
        options, plan = plan_default(model, options, lambda settled: sample.size(model, settled), bound, fixed)
        trace, row = sample.size(model, options), RowCost.of(model, sample.columns)
        sweep = trace.rows * row.operations
        seconds = sample.seconds + sweep / sweep_rate(model, options.arithmetic)
        seconds += calls(plan, trace, row) * call_seconds(model)
    operations = forward_operations(model, len(ids)) + sweep
    sampled = min(len(ids), _SAMPLE)
    return Estimate(len(ids), sampled, trace.features, trace.rows, trace.columns, plan, operations, seconds)


@dataclass(frozen=True, eq=False)
class Sample:
    """Features of a prompt, extrapolated from its first positions.

    targets: at the most; seconds: of the forward and the encoders; decoders, stored_bytes: as `TraceSize` has them.
    """

    columns: Columns
    targets: int
    seconds: float
    decoders: int
    stored_bytes: int | None

    def size(self, model: ReplacementModel, options: TraceOptions) -> TraceSize:
        """Return the size of the trace with these options."""
        positions = self.columns.positions
        layer, position = (torch.full((self.targets,), n, device="cpu") for n in (model.depth, positions - 1))
        return trace_size(self.columns, options, layer, position, self.decoders, self.stored_bytes)


def sample_prompt(
    model: ReplacementModel, ids: Tensor, options: TraceOptions, stored_bytes: int | None = None
) -> Sample:
    """Run the first positions of a prompt and extrapolate. stored_bytes: of a checkpoint's largest file."""
    begin = time.perf_counter()
    features = model.activations([ids[:_SAMPLE]])[0]
    seconds = (time.perf_counter() - begin) * len(ids) / min(len(ids), _SAMPLE)
    columns = _extrapolate(model, ids, features)
    scale = columns.features / max(1, sum(f.count for f in features))
    decoders = cached_row_bytes(model.transcoders.w_dec, features, scale)
    return Sample(columns, options.max_outputs(len(ids)), seconds, decoders, stored_bytes)


def _extrapolate(model: ReplacementModel, ids: Tensor, features: Sequence[SparseFeatures]) -> Columns:
    """Return columns of the prompt, with the sample's mean count and a margin at later positions."""
    before = torch.stack([f.row_ptr for f in features]).cpu().numpy()
    missing = len(ids) - before.shape[1] + 1
    counted = max(1, before.shape[1] - 1 - model.ignore_positions)
    mean = _MARGIN * before[:, -1:] / counted
    later = before[:, -1:] + np.ceil(mean * np.arange(1, missing + 1))
    return Columns(np.concatenate([before, later.astype(np.int64)], 1), len(ids))
