"""From a model and a prompt to an attribution graph."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from pycircuit.graph import Graph, Targets, Tokens
from pycircuit.model.freed_memory import released_at_once, trim
from pycircuit.model.replacement import LocalReplacement, ReplacementModel, check_model
from pycircuit.ops import StoredAttention
from pycircuit.ops.torch_settings import full_float32, without_autocast
from pycircuit.progress import Progress, Report
from pycircuit.transcoders.lazy import cached_row_bytes

from .checkpoint import Checkpoint, digest, reserved
from .collect import Found
from .columns import Columns
from .estimate import places, sample
from .finite import check_active
from .memory_model import Work, round_of
from .memory_plan import Bound, Fixed, MemoryBoundError, Plan, decide, least, refusal
from .precision import Arithmetic, Precision, arithmetic_of
from .row_store import Part
from .targets import Target, check, choose, positions_of


@without_autocast()
@full_float32()
def attribute(
    model: ReplacementModel,
    prompt: str | Sequence[int] | Tensor,
    targets: Any = None,
    max_features: int | None = None,
    position: int | Sequence[int] = -1,
    probability: float = 0.95,
    max_targets: int = 10,
    memory: str | int | None = None,
    progress: bool | Report = True,
    checkpoint: str | os.PathLike[str] | None = None,
    round_size: int | None = None,
    *,
    precision: Precision = "float32",
) -> Graph:
    """The graph of direct effects on the targets and on the features that matter to them.

    targets: None takes the likeliest next tokens up to `probability`, at most max_targets; or a list of token ids,
    token strings, (label, weight, direction) or pc.Feature. position: where the outputs are read, one or several.
    max_features: how many features get a row of their own, the most influential first, chosen in rounds of
    round_size (default an eighth of them, at least 64); None: all.
    memory: "8GiB" or bytes, what the run may take beside the model at its peak; None: most of what is free. Rows that
    do not fit keep their largest entries, and `graph.dropped` what was left out.
    progress: True writes to stderr, False is silent, a function is called with (phase, done, total).
    checkpoint: a folder for rows as they are found; the same call goes on from there after a kill, under another
    memory= too if rows can be kept and ranked as they were, and waits while another has the folder. Ctrl-C ends the
    sweep and returns the graph of the rows found so far, `provenance["interrupted"]` set.
    precision: of the sweep's products; docs/law.md has the choices, and how closely the law holds under each.
    """
    check_model("attribute", model)
    arithmetic = arithmetic_of("attribute", precision, model.device, model.dtype)
    max_features, max_targets, round_size = check(max_features, probability, max_targets, round_size)
    bound = Bound.of(memory, model.device)
    apart = released_at_once(bound.bytes) if bound.given else nullcontext()
    with apart, closing(Progress(progress)) as show, reserved(checkpoint, show):
        begin = time.perf_counter()
        ids = model.tokens(prompt)
        positions = positions_of(position, len(ids))
        outputs = len(positions) * (len(targets) if isinstance(targets, Sequence) else max_targets)
        fixed = Fixed() if checkpoint is None else Fixed(rows=Checkpoint.planned(checkpoint))
        saved = None if checkpoint is None else Checkpoint.largest(checkpoint)
        first = _first_plan(model, ids, max_features, outputs, arithmetic, bound, fixed, saved)  # or a refusal
        show.step("forward", 0, len(ids), "positions")

        def freeze(stored: bool) -> tuple[LocalReplacement, list[Target]]:
            local = model.freeze(ids, stored, lean=bound.given)
            trim()
            return local, choose(model, local, targets, position, probability, max_targets)

        local, chosen = freeze(first.stored)
        plan = decide(model, _work(local, chosen, max_features, round_size, arithmetic, saved), bound, fixed)
        if plan.stored != first.stored:  # with the features that there are, patterns have no place
            del local, chosen
            trim()
            local, chosen = freeze(plan.stored)
        forward = time.perf_counter() - begin
        graph = _run(model, local, chosen, max_features, round_size, arithmetic, plan, show, checkpoint, forward)
    settings = {"positions": positions, "probability": probability, "max_targets": max_targets}
    settings |= {"memory": bound.bytes if bound.given else None, "targets": "likeliest" if targets is None else "given"}
    graph.provenance["settings"].update(settings)
    return graph


@without_autocast()
@full_float32()
def trace_frozen(
    model: ReplacementModel,
    local: LocalReplacement,
    targets: Any = None,
    max_features: int | None = None,
    position: int | Sequence[int] = -1,
    probability: float = 0.95,
    max_targets: int = 10,
    round_size: int | None = None,
    *,
    precision: Precision = "float32",
) -> Graph:
    """`attribute` on a prompt that is frozen already, in silence: for tools that change what was frozen."""
    arithmetic = arithmetic_of("trace_frozen", precision, model.device, model.dtype)
    max_features, max_targets, round_size = check(max_features, probability, max_targets, round_size)
    chosen = choose(model, local, targets, position, probability, max_targets)
    fixed = Fixed(stored=isinstance(local.model.layers[0].attention, StoredAttention))
    work = _work(local, chosen, max_features, round_size, arithmetic, None)
    plan = decide(model, work, Bound.of(None, model.device), fixed)
    return _run(model, local, chosen, max_features, round_size, arithmetic, plan, Progress(False), None, 0.0)


def _first_plan(
    model: ReplacementModel,
    ids: Tensor,
    max_features: int | None,
    outputs: int,
    arithmetic: Arithmetic,
    bound: Bound,
    fixed: Fixed,
    saved: int | None,
) -> Plan:
    """The plan of a prompt of which nothing is known but its length, and so of the least that it can need."""
    try:
        return decide(model, Work(len(ids), 0, 1, 1, model.depth, False, arithmetic=arithmetic), bound)
    except MemoryBoundError:
        work = replace(sample(model, ids, max_features, outputs, arithmetic).work, stored_bytes=saved)
        raise MemoryBoundError(refusal(work, least(model, work, fixed), bound, fixed)) from None


def _work(
    local: LocalReplacement,
    targets: Sequence[Target],
    max_features: int | None,
    round_size: int | None,
    arithmetic: Arithmetic,
    saved: int | None,
) -> Work:
    """Rows of the targets and of the features that see most; saved: bytes of a checkpoint's largest file."""
    columns = Columns.of(local)
    layer, position = places(columns)
    sizes = columns.cone_sizes(layer, position)
    rows = len(sizes) if max_features is None else min(max_features, len(sizes))
    batch = max(len(targets), round_of(rows, len(sizes), round_size))
    ends = torch.tensor([[t.layer, t.position] for t in targets], device="cpu")
    entries = int(sizes.topk(rows).values.sum()) + int(columns.cone_sizes(*ends.unbind(1)).sum())
    return Work(
        positions=columns.positions,
        features=len(sizes),
        rows=rows + len(targets),
        entries=entries,
        layers=columns.layers,
        ranked=0 < rows < len(sizes),
        batch=batch,
        decoders=cached_row_bytes(local.transcoders.w_dec, local.features),
        busiest=columns.busiest,
        stored_bytes=saved,
        arithmetic=arithmetic,
    )


def _run(
    model: ReplacementModel,
    local: LocalReplacement,
    targets: list[Target],
    max_features: int | None,
    round_size: int | None,
    arithmetic: Arithmetic,
    plan: Plan,
    show: Progress,
    checkpoint: str | os.PathLike[str] | None,
    forward: float,
) -> Graph:
    begin, ranking = time.perf_counter(), 0.0
    check_active(local)
    collector = Found(local, targets, arithmetic)
    total = len(collector.layer)
    wanted = total if max_features is None else min(max_features, total)
    trim()
    folder = None if checkpoint is None else _checkpoint(checkpoint, collector, wanted, round_size, plan)
    collector.start(plan, show, folder, len(targets) + wanted)
    interrupted = False
    try:
        collector.add_targets()
        while (left := wanted - collector.expanded) > 0:
            before = time.perf_counter()
            step = min(left, round_of(wanted, total, round_size))
            picked = (
                torch.arange(total, device=collector.layer.device)
                if wanted == total
                else collector.most_influential(step)
            )
            ranking += time.perf_counter() - before
            collector.add_features(picked)
    except KeyboardInterrupt:
        if collector.store.count < len(targets):
            raise
        interrupted = True
        show.say(f"interrupted: the graph has rows for {collector.expanded} of {wanted} features")
    timings = {
        "forward": forward,
        "sweep": time.perf_counter() - begin - ranking - collector.packing,
        "ranking": ranking,
    }
    built = time.perf_counter()
    settings = {"max_features": max_features, "round_size": round_size}
    about = {"precision": arithmetic.name, "tolerance": arithmetic.tolerance}
    about |= {"settings": settings, "keep": plan.keep, "interrupted": interrupted}
    part = collector.finish()
    trim()
    graph = _graph(model, collector, part, targets, timings, about)
    timings["graph"] = time.perf_counter() - built + collector.packing
    return graph


def _checkpoint(
    folder: str | os.PathLike[str], collector: Found, wanted: int, round_size: int | None, plan: Plan
) -> Checkpoint:
    """The folder, if it holds nothing or this very run: same prompt, features, targets and settings, to the bit."""
    local = collector.local
    run = {
        "tokens": digest(local.model.tokens),
        "model": digest(local.model.final_stream, local.errors),
        "features": digest([f.row_ptr for f in local.features], collector.index, collector.value),
        "targets": [[t.label, t.layer, t.position, t.weight, digest(t.vector)] for t in collector.targets],
        "precision": collector.sweep.products.arithmetic.name,
        "max_features": wanted,
        "round_size": round_size,
        "plan": asdict(plan),
    }
    return Checkpoint(folder, run)


def _graph(
    model: ReplacementModel,
    collector: Found,
    part: Part,
    targets: list[Target],
    timings: dict[str, float],
    about: dict[str, Any],
) -> Graph:
    frozen = collector.local.model
    decode: Callable[[list[int]], Any] = str if model.tokenizer is None else model.tokenizer.decode
    tokens = frozen.tokens.cpu()
    text = [str(t) if model.tokenizer is None else str(decode([t])) for t in tokens.tolist()]
    return Graph(
        features=torch.stack([collector.layer, collector.position, collector.index], 1),
        values=collector.value,
        rows=part.rows(),
        row_node=collector.row_node(),
        bias=collector.row_bias(),
        preactivation=collector.preactivation(),
        product_norm=collector.product_norm(),
        targets=Targets(
            [t.label for t in targets],
            torch.tensor([t.token for t in targets], device="cpu"),
            torch.tensor([t.weight for t in targets], dtype=torch.float64, device="cpu"),
            torch.tensor([t.position for t in targets], device="cpu"),
        ),
        tokens=Tokens(tokens, text),
        layers=len(frozen.layers),
        prompt=" ".join(text) if model.tokenizer is None else str(decode(tokens.tolist())),
        vocab_size=frozen.unembedding.shape[0],
        dropped=torch.from_numpy(part.dropped),
        dropped_mass=torch.from_numpy(part.mass),
        timings=timings,
        provenance=_provenance(model, about),
        labels=_labels(model, collector),
    )


def _labels(model: ReplacementModel, collector: Found) -> dict[tuple[int, int], str]:
    """Of features that are active, by (layer, feature)."""
    if not model.labels:
        return {}
    active = [set(f.index.unique().tolist()) for f in collector.local.features]
    return {key: label for key, label in model.labels.items() if key[0] < len(active) and key[1] in active[key[0]]}


def _provenance(model: ReplacementModel, about: dict[str, Any]) -> dict[str, Any]:
    """What it takes to get this graph again."""
    import transformers

    from pycircuit import __version__

    return {
        "model": str(getattr(model.hf_model.config, "_name_or_path", "") or model.family.model_type),
        "family": model.family.model_type,
        "transcoders": repr(model.transcoders),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "ignore_positions": model.ignore_positions,
        "versions": {"pycircuit": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        **about,
    }
