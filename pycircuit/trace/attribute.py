"""Trace of a prompt, top to bottom. The numbers of its steps are those of the package's docstring."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pycircuit.graph import Graph
from pycircuit.labels.automatic import Labels, add_labels, check_labels
from pycircuit.model.freed_memory import released_at_once, trim
from pycircuit.model.replacement import LocalReplacement, ReplacementModel, check_model
from pycircuit.ops import StoredAttention
from pycircuit.ops.torch_settings import full_float32, without_autocast
from pycircuit.progress import Progress, Report
from pycircuit.transcoders.lazy import cached_row_bytes

from .checkpoint import Checkpoint, digest, reserved
from .collect import RowCollector
from .columns import Columns
from .default_features import plan_default, with_default
from .estimate import sample_prompt
from .finite import check_active
from .graph_of_rows import graph_of_rows
from .memory_model import TraceSize, round_length, trace_size
from .memory_plan import Bound, Fixed, MemoryBoundError, MemoryPlan, plan_memory, refusal_message, smallest_bound
from .precision import Precision
from .targets import Target, TargetList, choose
from .trace_options import MaxFeatures, TraceOptions


@without_autocast()
@full_float32()
def attribute(
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
    labels: Labels = True,
) -> Graph:
    """Return the graph of direct effects on the targets and on the features that influence them most.

    targets: None for the likeliest next tokens up to `probability`, at most max_targets; or a list of token ids, token
    strings, (label, weight, direction), pc.Contrast or pc.Feature. max_features: how many features get a row of their
    own, the most influential first; "all"; None: 4,096, or as many as take about five minutes and fit the memory, and
    the progress says how many of all. position: where the outputs are read, one or several.
    precision: of the sweep's products; docs/law.md has the choices, and how closely the law holds under each.
    memory: "8GiB" or bytes, the peak beside the model; None: most of what is free. Rows that do not fit keep their
    largest entries, and `graph.dropped` has the sum of the others.
    checkpoint: a folder for rows as they come; the same call goes on from there after a kill, under another memory=
    too if rows can be kept and ranked as they were, and waits while another run has the folder.
    progress: True writes to stderr, False is silent, a function is called with (phase, done, total). Ctrl-C ends the
    sweep and returns the graph of the rows so far, `provenance["interrupted"]` set.
    round_size: features chosen at a time; None: an eighth of max_features, at least 64.
    labels: give features without a name automatic labels, as pc.label does, from a folder of pc.write_examples or,
    with True, from the prompt; the tokens raised are found for the most influential features.
    """
    check_model("attribute", model)
    check_labels("attribute", labels)
    options = TraceOptions.checked(
        "attribute", model, targets, max_features, position, probability, max_targets, precision, round_size
    )
    bound = Bound.of(memory, model.device)
    allocator = released_at_once(bound.bytes) if bound.by_user else nullcontext()
    with allocator, closing(Progress(progress)) as progress_line, reserved(checkpoint, progress_line):
        begin = time.perf_counter()
        ids = model.tokens(prompt)
        settings = _settings(options, bound, len(ids))
        local, chosen, options, plan = _freeze_and_plan(model, ids, options, bound, checkpoint, progress_line)
        settings["max_features"] = "all" if options.max_features is None else options.max_features
        forward = time.perf_counter() - begin
        graph = _trace(model, local, chosen, options, plan, progress_line, checkpoint, settings, forward)
        del local
        # 11. Label the features.
        _label(model, graph, labels, progress_line)
        return graph


@without_autocast()
@full_float32()
def trace_frozen(
    model: ReplacementModel,
    local: LocalReplacement,
    *,
    targets: TargetList = None,
    max_features: MaxFeatures = None,
    position: int | Sequence[int] = -1,
    probability: float = 0.95,
    max_targets: int = 10,
    precision: Precision = "float32",
    round_size: int | None = None,
    progress: Progress | None = None,
) -> Graph:
    """Return the graph of a prompt that is frozen already: `attribute` for tools that change what was frozen."""
    options = TraceOptions.checked(
        "trace_frozen", model, targets, max_features, position, probability, max_targets, precision, round_size
    )
    chosen = _choose(model, local, options)
    fixed = Fixed(stored=isinstance(local.model.layers[0].attention, StoredAttention))
    plan = plan_memory(model, _size(local, chosen, options, None), Bound.of(None, model.device), fixed)
    settings = {"max_features": options.max_features, "round_size": options.round_size}
    return _trace(model, local, chosen, options, plan, progress or Progress(False), None, settings, 0.0)


def _label(model: ReplacementModel, graph: Graph, labels: Labels, progress: Progress) -> None:
    """Add automatic labels, unless the trace was interrupted or is now."""
    if labels is False or graph.provenance["interrupted"]:
        return
    begin = time.perf_counter()
    try:
        add_labels(model, graph, labels, progress)
    except KeyboardInterrupt:
        progress.say("interrupted: the graph is complete, without automatic labels; pc.label adds them")
    graph.timings["labels"] = time.perf_counter() - begin


def _settings(options: TraceOptions, bound: Bound, positions: int) -> dict[str, Any]:
    """Return the settings of a trace for its provenance."""
    return {
        "max_features_chosen": options.chosen,
        "round_size": options.round_size,
        "positions": options.positions(positions),
        "probability": options.probability,
        "max_targets": options.max_targets,
        "memory": bound.bytes if bound.by_user else None,
        "targets": "likeliest" if options.targets is None else "given",
    }


def _freeze_and_plan(
    model: ReplacementModel,
    ids: Tensor,
    options: TraceOptions,
    bound: Bound,
    checkpoint: str | os.PathLike[str] | None,
    progress: Progress,
) -> tuple[LocalReplacement, list[Target], TraceOptions, MemoryPlan]:
    fixed = Fixed(rows=Checkpoint.planned(checkpoint))
    stored_bytes = Checkpoint.largest(checkpoint)
    # 1. Check the length.
    stored = _minimal_plan(model, ids, options, bound, fixed, stored_bytes).stored
    progress.step("forward", 0, len(ids), "positions")

    # 2. Run and freeze the model.
    local = _freeze(model, ids, stored, bound)
    # 3. Choose the targets.
    targets = _choose(model, local, options)
    # 4 and 5. Count the columns that they see, and plan the memory.
    columns = Columns.of(local)
    options = with_default(model, options, columns, checkpoint)
    options, plan = plan_default(
        model, options, lambda settled: _size(local, targets, settled, stored_bytes), bound, fixed
    )
    _say_limit(options, columns.features, progress)
    if plan.stored != stored:  # beside the features, there is no memory for patterns
        del local, targets
        trim()
        local = _freeze(model, ids, plan.stored, bound)
        targets = _choose(model, local, options)
    return local, targets, options, plan


def _say_limit(options: TraceOptions, active: int, progress: Progress) -> None:
    """Say that only a part of the features get rows, where nobody chose it."""
    rows = options.expanded(active)
    if not options.chosen and rows < active:
        progress.say(f'{rows:,} of {active:,} active features get a row (max_features="all" gives all of them one)')


def _minimal_plan(
    model: ReplacementModel,
    ids: Tensor,
    options: TraceOptions,
    bound: Bound,
    fixed: Fixed,
    stored_bytes: int | None,
) -> MemoryPlan:
    """Return the plan of a prompt without features, the least that its length can need, or raise MemoryBoundError."""
    minimum = TraceSize(len(ids), 0, 1, 1, model.depth, False, arithmetic=options.arithmetic)
    try:
        return plan_memory(model, minimum, bound)
    except MemoryBoundError:
        trace = sample_prompt(model, ids, options, stored_bytes).size(model, options)
        raise MemoryBoundError(refusal_message(trace, smallest_bound(model, trace, fixed), bound, fixed)) from None


def _freeze(model: ReplacementModel, ids: Tensor, stored: bool, bound: Bound) -> LocalReplacement:
    local = model.freeze(ids, stored, lean=bound.by_user)
    trim()
    return local


def _choose(model: ReplacementModel, local: LocalReplacement, options: TraceOptions) -> list[Target]:
    return choose(model, local, options.targets, options.position, options.probability, options.max_targets)


def _size(
    local: LocalReplacement, targets: Sequence[Target], options: TraceOptions, stored_bytes: int | None
) -> TraceSize:
    layer, position = torch.tensor([[t.layer, t.position] for t in targets], device="cpu").unbind(1)
    decoders = cached_row_bytes(local.transcoders.w_dec, local.features)
    return trace_size(Columns.of(local), options, layer, position, decoders, stored_bytes)


def _trace(
    model: ReplacementModel,
    local: LocalReplacement,
    targets: list[Target],
    options: TraceOptions,
    plan: MemoryPlan,
    progress: Progress,
    checkpoint: str | os.PathLike[str] | None,
    settings: dict[str, Any],
    forward: float,
) -> Graph:
    """Return the graph of a frozen prompt. forward: the seconds that freezing it took."""
    begin = time.perf_counter()
    check_active(local)
    expanded = options.expanded(sum(features.count for features in local.features))
    trim()
    folder = None if checkpoint is None else _checkpoint(checkpoint, local, targets, options, expanded, plan)
    collector = RowCollector(local, targets, plan, progress, len(targets) + expanded, options.arithmetic, folder)
    # 6 to 9. Sweep, store and rank.
    ranking, interrupted = _collect(collector, expanded, options.round_size)
    sweep = time.perf_counter() - begin - ranking - collector.packing_seconds
    timings = {"forward": forward, "sweep": sweep, "ranking": ranking}
    # 10. Build the graph.
    begin = time.perf_counter()
    provenance = {
        "precision": options.arithmetic.name,
        "tolerance": options.arithmetic.tolerance,
        "settings": settings,
        "keep": plan.keep,
        "interrupted": interrupted,
    }
    packed = collector.finish()
    trim()
    graph = graph_of_rows(model, collector, packed, timings, provenance)
    timings["graph"] = time.perf_counter() - begin + collector.packing_seconds
    return graph


def _collect(collector: RowCollector, expanded: int, round_size: int | None) -> tuple[float, bool]:
    """Collect rows of the targets and of features; return the seconds of ranking, and True after Ctrl-C."""
    active = len(collector.layer)
    ranking = 0.0
    try:
        collector.add_targets()
        while (missing := expanded - collector.expanded) > 0:
            begin = time.perf_counter()
            if expanded == active:
                chosen = torch.arange(active, device=collector.layer.device)
            else:
                chosen = collector.most_influential(min(missing, round_length(expanded, active, round_size)))
            ranking += time.perf_counter() - begin
            collector.add_features(chosen)
    except KeyboardInterrupt:
        if collector.store.count < len(collector.targets):
            raise
        collector.progress.say(f"interrupted: the graph has rows for {collector.expanded} of {expanded} features")
        return ranking, True
    return ranking, False


def _checkpoint(
    folder: str | os.PathLike[str],
    local: LocalReplacement,
    targets: Sequence[Target],
    options: TraceOptions,
    expanded: int,
    plan: MemoryPlan,
) -> Checkpoint:
    """Open the folder, if it is empty or has this very run: same prompt, features, targets and settings, to the bit."""
    index = torch.cat([features.index for features in local.features])
    value = torch.cat([features.value for features in local.features])
    run = {
        "tokens": digest(local.model.tokens),
        "model": digest(local.model.final_stream, local.errors),
        "features": digest([features.row_ptr for features in local.features], index, value),
        "targets": [[t.label, t.layer, t.position, t.weight, digest(t.vector)] for t in targets],
        "precision": options.arithmetic.name,
        "max_features": expanded,
        "round_size": options.round_size,
        "plan": asdict(plan),
    }
    return Checkpoint(folder, run)
