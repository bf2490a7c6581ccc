"""From a model and a prompt to an attribution graph."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pycircuit.graph import Graph, Targets, Tokens
from pycircuit.model.replacement import LocalReplacement, ReplacementModel, check_model
from pycircuit.ops.precision import without_autocast
from pycircuit.progress import Progress, Report
from pycircuit.transcoders.lazy import kept_bytes

from .checkpoint import Checkpoint, digest
from .finite import check_active
from .plan import Plan, Work, decide, parse_bytes
from .rows import Found
from .targets import Target, check, choose, positions_of


@without_autocast()
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
) -> Graph:
    """The graph of direct effects on the targets and on the features that matter to them.

    targets: None takes the likeliest next tokens up to `probability`, at most max_targets; or a list of token ids,
    token strings, (label, weight, direction) or pc.Feature. position: where the outputs are read, one or several.
    max_features: how many features get a row of their own, the most influential first, chosen in rounds of
    round_size (default an eighth of them, at least 64); None: all.
    memory: "8GiB" or bytes, what the run may take beside the model; None: most of what is free. Rows that do not fit
    keep their largest entries, and `graph.dropped` what was left out.
    progress: True writes to stderr, False is silent, a function is called with (phase, done, total).
    checkpoint: a folder for rows as they are found; the same call goes on from there after a kill. Ctrl-C ends the
    sweep and returns the graph of the rows found so far, `provenance["interrupted"]` set.
    """
    check_model("attribute", model)
    check(max_features, probability, max_targets, round_size)
    bound = parse_bytes(memory)
    with closing(Progress(progress)) as show:
        begin = time.perf_counter()
        ids = model.tokens(prompt)
        positions = positions_of(position, len(ids))
        _plan(model, len(ids), bound)  # a prompt that cannot fit is refused here
        show.step("forward", 0, len(ids), "positions")
        local = model.freeze(ids)
        chosen = choose(model, local, targets, position, probability, max_targets)
        forward = time.perf_counter() - begin
        graph = _run(model, local, chosen, max_features, round_size, bound, show, checkpoint, forward)
    asked = {"positions": positions, "probability": probability, "max_targets": max_targets, "memory": bound}
    graph.provenance["settings"].update(asked | {"targets": "likeliest" if targets is None else "given"})
    return graph


@without_autocast()
def trace_frozen(
    model: ReplacementModel,
    local: LocalReplacement,
    targets: Any = None,
    max_features: int | None = None,
    position: int | Sequence[int] = -1,
    probability: float = 0.95,
    max_targets: int = 10,
    round_size: int | None = None,
) -> Graph:
    """`attribute` on a prompt that is frozen already, in silence: for tools that change what was frozen."""
    check(max_features, probability, max_targets, round_size)
    chosen = choose(model, local, targets, position, probability, max_targets)
    return _run(model, local, chosen, max_features, round_size, None, Progress(False), None, 0.0)


def _plan(model: ReplacementModel, positions: int, bound: int | None) -> Plan:
    """Of a prompt of which nothing is known but its length: the least it can need."""
    return decide(model, Work(positions, 0, 1, 1, model.depth, False), bound)


def _work(found: Found, targets: Sequence[Target], rows: int) -> Work:
    """Rows of the targets and of `rows` features; of those the ones that see most are taken."""
    columns, layers, positions = found.sweep.columns, found.layer, found.position
    depth, local = columns.layers, found.local
    kept = kept_bytes(local.transcoders.w_dec, [len(f.index.unique()) for f in local.features])
    sizes = columns.cone_sizes(layers, positions)
    seen = int(sizes.topk(rows).values.sum()) if rows else 0
    ends = torch.tensor([[t.layer, t.position] for t in targets], device="cpu")
    entries = seen + int(columns.cone_sizes(*ends.unbind(1)).sum())
    return Work(columns.positions, len(layers), rows + len(targets), entries, depth, 0 < rows < len(layers), kept)


def _run(
    model: ReplacementModel,
    local: LocalReplacement,
    targets: list[Target],
    max_features: int | None,
    round_size: int | None,
    bound: int | None,
    show: Progress,
    checkpoint: str | os.PathLike[str] | None,
    forward: float,
) -> Graph:
    begin, ranking = time.perf_counter(), 0.0
    check_active(local)
    found = Found(local, targets)
    total = len(found.layer)
    wanted = total if max_features is None else min(max_features, total)
    plan = decide(model, _work(found, targets, wanted), bound)
    folder = None if checkpoint is None else _checkpoint(checkpoint, found, targets, wanted, round_size, plan)
    if folder is not None:
        plan = Plan(**folder.run["plan"])
    found.start(plan, show, folder, len(targets) + wanted)
    interrupted = False
    try:
        found.add_targets()
        while (left := wanted - found.expanded) > 0:
            before = time.perf_counter()
            step = left if wanted == total else min(left, round_size or max(64, wanted // 8))
            picked = torch.arange(total, device=found.layer.device) if wanted == total else found.most_influential(step)
            ranking += time.perf_counter() - before
            found.add_features(picked)
    except KeyboardInterrupt:
        if found.store.count < len(targets):
            raise
        interrupted = True
        show.say(f"interrupted: the graph has rows for {found.expanded} of {wanted} features")
    timings = {"forward": forward, "sweep": time.perf_counter() - begin - ranking - found.packing, "ranking": ranking}
    built = time.perf_counter()
    settings = {"max_features": max_features, "round_size": round_size}
    about = {"settings": settings, "keep": plan.keep, "interrupted": interrupted}
    graph = _graph(model, found, targets, timings, about)
    timings["graph"] = time.perf_counter() - built + found.packing
    return graph


def _checkpoint(
    folder: str | os.PathLike[str], found: Found, targets: list[Target], wanted: int, round_size: int | None, plan: Plan
) -> Checkpoint:
    """The folder, if it holds nothing or this very run: same prompt, features, targets and settings, to the bit."""
    local = found.local
    run = {
        "tokens": digest(local.model.tokens),
        "model": digest(local.model.final_stream, local.errors),
        "features": digest([f.row_ptr for f in local.features], found.index, found.value),
        "targets": [[t.label, t.layer, t.position, t.weight, digest(t.vector)] for t in targets],
        "max_features": wanted,
        "round_size": round_size,
        "plan": asdict(plan),
    }
    return Checkpoint(folder, run)


def _graph(
    model: ReplacementModel, found: Found, targets: list[Target], timings: dict[str, float], about: dict[str, Any]
) -> Graph:
    frozen, part = found.local.model, found.finish()
    decode: Callable[[list[int]], Any] = str if model.tokenizer is None else model.tokenizer.decode
    text = [str(t) if model.tokenizer is None else str(decode([t])) for t in frozen.tokens.tolist()]
    return Graph(
        features=torch.stack([found.layer, found.position, found.index], 1),
        values=found.value,
        rows=part.rows(),
        row_node=found.row_node(),
        bias=found.row_bias(),
        preactivation=found.preactivation(),
        product_norm=found.product_norm(),
        targets=Targets(
            [t.label for t in targets],
            torch.tensor([t.token for t in targets], device="cpu"),
            torch.tensor([t.weight for t in targets], dtype=torch.float64, device="cpu"),
            torch.tensor([t.position for t in targets], device="cpu"),
        ),
        tokens=Tokens(frozen.tokens, text),
        layers=len(frozen.layers),
        prompt=" ".join(text) if model.tokenizer is None else str(decode(frozen.tokens.tolist())),
        vocab_size=frozen.unembedding.shape[0],
        dropped=torch.from_numpy(part.dropped),
        dropped_mass=torch.from_numpy(part.mass),
        timings=timings,
        provenance=_provenance(model, about),
        labels=_labels(model, found),
    )


def _labels(model: ReplacementModel, found: Found) -> dict[tuple[int, int], str]:
    """Of features that are active, by (layer, feature)."""
    if not model.labels:
        return {}
    active = set(zip(found.layer.tolist(), found.index.tolist(), strict=True))
    return {key: label for key, label in model.labels.items() if key in active}


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
