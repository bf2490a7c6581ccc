"""Whole traces at the GPU shapes, built on the card: seconds by phase, the law, peaks, agreement of precisions."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gpu_profile
import torch
from gpu_files import Section, attempt, reason
from torch import Tensor
from transformers.models.llama import modeling_llama  # noqa: F401 - seconds that are not the model's either

import pycircuit as pc
from pycircuit.bench import cone, memory, models
from pycircuit.bench.shapes import SHAPES, Shape
from pycircuit.graph import Graph
from pycircuit.trace.precision import PRECISIONS

RUNS = 3
TINY = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 8, "features": 128, "active": 6}
FEW_ROWS = 128  # of a long prompt, to predict the time of all
LONG = {"gemma2b-long": ["float32"], "gemma2b-long8k": ["float32", "float32-fast", "bfloat16"]}  # precisions of a shape
COMPARED = 64  # rows of two graphs


def precisions(device: str) -> list[str]:
    """Precisions of a device, the default first."""
    return [name for name in PRECISIONS if device == "cuda" or name != "tf32"]


def shape_of(section: Section, name: str) -> Shape:
    """Standard shape, or in a dry run a tiny one of the same kind."""
    shape = SHAPES[name]
    if not section.dry:
        return shape
    return replace(shape, **TINY, positions=min(shape.positions, 12), targets=shape.targets and 20)


def free_memory(section: Section) -> None:
    gc.collect()
    if section.device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def replacement(section: Section, shape: Shape) -> Iterator[pc.ReplacementModel]:
    """Model of a shape on the card; saves seconds and bytes of building it, and frees the memory at the end."""
    torch.zeros((), device=section.device)  # the start of CUDA does not count for the model
    begin = time.perf_counter()
    model = models.replacement(shape, section.device)
    if section.device == "cuda":
        torch.cuda.synchronize()
    size = torch.cuda.memory_allocated() if section.device == "cuda" else None
    section.save(f"{shape.name} built", {"seconds": time.perf_counter() - begin, "bytes": size})
    try:
        yield model
    finally:
        del model
        free_memory(section)


def traced(
    section: Section, model: pc.ReplacementModel, shape: Shape, precision: str, targets: int | None
) -> tuple[Graph, dict[str, Any]]:
    """Graph of one run, and its seconds, phases, certificate, dropped mass and peaks."""
    cuda, prompt = section.device == "cuda", models.prompt(shape.positions)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    resident = attempt(memory.restart_peak)  # a sandbox may forbid it
    begin = time.perf_counter()
    graph = pc.attribute(
        model, prompt, max_features=targets or "all", labels=False, progress=False, precision=precision
    )
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    run = {"seconds": seconds, "timings": dict(graph.timings), "certificate": graph.certificate}
    run |= {"rows": graph.rows.count, "active": len(graph.features), "entries": int(graph.rows.row_ptr[-1])}
    run["dropped mass"] = float(graph.dropped_mass.max()) if len(graph.dropped_mass) else 0.0
    run["peak device bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    run |= {"host bytes before": resident, "peak host bytes": memory.peak()}
    operations = cone.operations(shape, *cone.expanded(graph))
    run |= {"cone operations": operations, "sweep tflops": operations / graph.timings["sweep"] / 1e12}
    return graph, run


def agreement(expected: Graph, graph: Graph) -> dict[str, Any]:
    """Largest distance of rows that both graphs have, over the first's norm, and the number of such rows."""
    if not torch.equal(expected.features.cpu(), graph.features.cpu()):
        return {"unavailable": "other features are active", "active": [len(expected.features), len(graph.features)]}
    common = sorted(set(expected.row_node.tolist()) & set(graph.row_node.tolist()))
    distances = [0.0]
    for node in common[:: max(1, len(common) // COMPARED)]:
        ours, theirs = dense_row(expected, node), dense_row(graph, node)
        distances.append(float((ours - theirs).norm() / ours.norm().clamp(min=1e-30)))
    return {"largest distance": max(distances), "shared rows": len(common), "rows": expected.rows.count}


def dense_row(graph: Graph, node: int) -> Tensor:
    """Row of a node over all columns: [nodes] float64."""
    out = torch.zeros(graph.nodes, dtype=torch.float64)
    column, weight = graph.rows.row(int((graph.row_node == node).nonzero()[0, 0]))
    out[column.long().cpu()] = weight.double().cpu()
    return out


def repeated(
    section: Section, model: pc.ReplacementModel, shape: Shape, precision: str, runs: int, first: Graph | None
) -> Graph | None:
    """Graph of the last of `runs` runs of one precision, each saved; None where there was no time."""
    name, results, graph = f"{shape.name} {precision}", [], None
    section.save(name, {"runs": results})
    for _ in range(runs):
        needed = 1.3 * results[-1]["seconds"] if results else 0.0
        if section.left() < needed:
            section.content[name]["stopped"] = f"a run takes {needed / 1.3:.1f} s, {section.left():.1f} s are left"
            break
        try:
            graph, run = traced(section, model, shape, precision, shape.targets)
        except Exception as error:
            section.content[name]["unavailable"] = reason(error)
            section.mark(f"{name}: {reason(error)}")
            break
        results.append(run)
        section.save(name, {"runs": results})
        if not run["certificate"] < PRECISIONS[precision].tolerance:
            section.mark(f"{name}: the certificate is {run['certificate']:.1e}")
    if graph is not None and first is not None:
        section.content[name]["agreement"] = attempt(lambda: agreement(first, graph))
    section.save(name, section.content[name])
    return graph


def plt(section: Section) -> None:
    """Measure the ten-token call, the whole trace in every precision, its synchronisations and its profile."""
    _short(section, shape_of(section, "gemma2b-ten"))
    shape, (first, *others) = shape_of(section, "gemma2b"), precisions(section.device)
    with replacement(section, shape) as model:
        repeated(section, model, replace(shape, name=f"{shape.name} warm-up"), first, 1, None)
        graph = repeated(section, model, shape, first, RUNS, None)
        for precision in others:
            if not section.skip(f"{shape.name} {precision}", 5):
                repeated(section, model, shape, precision, RUNS, graph)
        del graph
        gpu_profile.synchronisations(section, lambda: traced(section, model, shape, first, shape.targets))
        gpu_profile.profile(section, lambda: traced(section, model, shape, first, shape.targets), "the whole trace")


def _short(section: Section, shape: Shape) -> None:
    """Measure the published ten-token call: a warm-up, then runs of every precision."""
    with replacement(section, shape) as model:
        repeated(section, model, replace(shape, name=f"{shape.name} warm-up"), precisions(section.device)[0], 1, None)
        graph: Graph | None = None
        for precision in precisions(section.device):
            last = repeated(section, model, shape, precision, RUNS, graph)
            graph = graph or last


def clt(section: Section) -> None:
    shape, (first, *others) = shape_of(section, "gemma2b-clt"), precisions(section.device)
    with replacement(section, shape) as model:
        repeated(section, model, replace(shape, name=f"{shape.name} warm-up"), first, 1, None)
        graph = repeated(section, model, shape, first, 2, None)
        for precision in others[:1]:
            if not section.skip(f"{shape.name} {precision}", 5):
                repeated(section, model, shape, precision, 2, graph)


def long(section: Section) -> None:
    """Measure a few rows of every long prompt in several precisions, then all rows where the predicted time is left."""
    known = precisions(section.device)
    for name, chosen in LONG.items():
        shape = shape_of(section, name)
        if section.skip(name, 10):
            continue
        with replacement(section, shape) as model:
            few = min(FEW_ROWS, max(2, (shape.targets or 0) // 4))
            first, *_ = [_few_rows(section, model, shape, precision, few) for precision in chosen if precision in known]
            if first is not None:
                _all_rows(section, model, shape, few, first)


def _few_rows(
    section: Section, model: pc.ReplacementModel, shape: Shape, precision: str, few: int
) -> dict[str, Any] | None:
    """Measure a few rows twice, as the first time kernels are compiled; None where that fails."""
    name = f"{shape.name} {few} rows" + ("" if precision == precisions(section.device)[0] else f" {precision}")
    for warmth in ("first", "again"):
        result = attempt(lambda: traced(section, model, shape, precision, few)[1])
        section.save(f"{name} {warmth}", result)
        if "unavailable" in result:
            section.mark(f"{shape.name} {precision}: {result['unavailable']}")
            return None
    return dict(result)


def _all_rows(section: Section, model: pc.ReplacementModel, shape: Shape, few: int, run: dict[str, Any]) -> None:
    """Measure the whole trace of a long prompt, if the time predicted from a few rows is left."""
    forward = run["timings"]["forward"]
    predicted = forward + (run["seconds"] - forward) * (shape.targets or 0) / few
    section.save(f"{shape.name} predicted seconds", predicted)
    if not section.skip(shape.name, 1.1 * predicted):
        repeated(section, model, shape, precisions(section.device)[0], 1, None)
