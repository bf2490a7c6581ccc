"""Cost of a trace: its floating-point operations and its calls, and the rates of this machine measured now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch

from pycircuit import ops
from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import SparseFeatures

from .columns import Columns
from .memory_model import TraceSize
from .memory_plan import MemoryPlan
from .precision import Arithmetic, Products

_SHARE = 0.5  # of the rate of matrix products that a trace reaches
_TRACE_CALLS, _TILE_CALLS, _ROW_CALLS = 24, 9, 0.13  # of small ops: of a trace; of a tile and of a row, a layer
_MOMENT = 0.01  # seconds of each measurement


@dataclass(frozen=True)
class RowCost:
    """Mean cost of a feature's row. operations: floating-point; positions: that it sees."""

    operations: float
    positions: float

    @classmethod
    def of(cls, model: ReplacementModel, columns: Columns) -> RowCost:
        layer, position = columns.feature_positions()
        if not len(layer):
            return cls(0.0, 1.0)
        width, first = model.width, model.weights.layers[0]
        inner = first.w_o.shape[1] + first.w_v.shape[0]
        longest = position + 1
        projected = (layer - 1).clamp_min(0).double() * longest  # positions projected down and up again
        operations = projected * (2 * width * inner + first.w_o.shape[1] * longest)
        operations += 2.0 * width * columns.cone_sizes(layer, position)
        return cls(float(operations.mean()), float(longest.double().mean()))


def forward_operations(model: ReplacementModel, positions: int) -> float:
    """Return operations of the forward with the encoders."""
    weights = sum(p.numel() for p in model.hf_model.parameters())
    encoders = sum(model.transcoders.size(layer) * model.width for layer in range(model.depth))
    return 2.0 * positions * (weights + encoders)


def sweep_rate(model: ReplacementModel, arithmetic: Arithmetic) -> float:
    """Measure the operations a second that a sweep reaches."""
    rows, weight = (torch.ones(n, 1024, dtype=model.dtype, device=model.device) for n in (512, 1024))
    products, weight = Products(arithmetic), weight.T
    rate = 2.0 * 512 * 1024 * 1024 / _mean_seconds(lambda: float(products.project(rows, weight)[0, 0]))
    return _SHARE * rate


def calls(plan: MemoryPlan, trace: TraceSize, row: RowCost) -> float:
    """Return the work that does not grow with a tensor's size, in calls of a small op: of trace, tiles and rows."""
    rounds = 1 + ceil(trace.rows / max(1, trace.batch)) if trace.rows else 1
    tile_targets = max(1.0, plan.targets * trace.positions / row.positions)
    tiles = max(rounds, ceil(trace.rows / tile_targets))
    return _TRACE_CALLS + trace.layers * (tiles * _TILE_CALLS + trace.rows * _ROW_CALLS)


def call_seconds(model: ReplacementModel) -> float:
    """Measure the seconds of an op on a few numbers: checks, dispatch, and the call of the kernel."""
    device = model.device
    rows = torch.ones(4, 8, dtype=model.dtype, device=device)
    out = torch.zeros(1, 4, dtype=model.dtype, device=device)
    row_ptr, index = torch.arange(5, device=device), torch.arange(4, device=device)
    features = SparseFeatures(row_ptr, index, rows[:, 0].contiguous())
    prefix_ptr = torch.tensor([0, 4], device=device)
    return _mean_seconds(lambda: float(ops.edge_scores(rows, prefix_ptr, features, rows, out)[0, 0]))


def _mean_seconds(call: Callable[[], float]) -> float:
    """Measure the mean seconds of a call, not the best: other programs slow the trace as they slow this."""
    call()
    begin, count, spent = time.perf_counter(), 0, 0.0
    while spent < _MOMENT:
        call()
        count, spent = count + 1, time.perf_counter() - begin
    return spent / count
