"""Number of features that get a row where the caller names none: few enough for a few minutes and for the memory."""

from __future__ import annotations

import os
from collections.abc import Callable

from pycircuit.model.replacement import ReplacementModel

from .checkpoint import Checkpoint
from .columns import Columns
from .memory_model import TraceSize
from .memory_plan import Bound, Fixed, MemoryBoundError, MemoryPlan, plan_memory
from .trace_cost import RowCost, sweep_rate
from .trace_options import TraceOptions

SECONDS = 300.0  # of a trace by default, about
FEWEST = 256  # features, however long they take
_SLOWEST = 1e9  # operations a second that every machine reaches: a trace of so few is not measured first


def with_default(
    model: ReplacementModel,
    options: TraceOptions,
    columns: Columns,
    checkpoint: str | os.PathLike[str] | None,
) -> TraceOptions:
    """Return the options with the number of features that takes about SECONDS, at most the default.

    Options whose number was chosen stay as they are, and a checkpoint keeps the number that it began with.
    """
    if options.chosen:
        return options
    begun = Checkpoint.begun_features(checkpoint)
    if begun is not None:
        return options.limited(begun)
    rows, operations = options.expanded(columns.features), RowCost.of(model, columns).operations
    if rows <= FEWEST or rows * operations <= SECONDS * _SLOWEST:
        return options
    affordable = int(SECONDS * sweep_rate(model, options.arithmetic) / operations)
    return options.limited(max(FEWEST, affordable)) if affordable < rows else options


def plan_default(
    model: ReplacementModel,
    options: TraceOptions,
    size: Callable[[TraceOptions], TraceSize],
    bound: Bound,
    fixed: Fixed,
) -> tuple[TraceOptions, MemoryPlan]:
    """Return (options, plan) that fit the memory, with fewer features than the default where they must.

    size: of the trace with some options. MemoryBoundError if nothing fits, or if the number of features was chosen or
    is that of a checkpoint.
    """
    while True:
        trace = size(options)
        try:
            return options, plan_memory(model, trace, bound, fixed)
        except MemoryBoundError:
            if options.chosen or fixed.rows is not None or options.expanded(trace.features) <= FEWEST:
                raise
        options = options.limited(max(FEWEST, options.expanded(trace.features) // 2))
