"""Every kernel a run launches, compiled by many processes while the checkout is still being installed.

They launch what later sections launch: Triton keeps a binary by source, types, alignments and configuration, so the
sections find theirs in its cache. The package comes from the checkout, whose native core is not needed.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any

import triton
from gpu_files import Section, attempt, reason

OPS = ("attend_back", "edge_scores", "encode", "decode", "influence")
SHARES = 3  # of an op's launches


def launches_of_op(op: str, share: int, device: str) -> Iterator[Callable[[], Any]]:
    """Every SHARES-th of an op's inputs at the GPU shapes."""
    from gpu_shapes import COMPILED, TINY, items

    module = importlib.import_module(f"pycircuit.kernels.{op}")
    for number, item in enumerate(items(op, device, TINY if device == "cpu" else COMPILED)):
        if number % SHARES == share:
            yield partial(lambda i: getattr(module, op)(*i.arguments()), item)


def launches_of_tuning(op: str, share: int, device: str) -> Iterator[Callable[[], Any]]:
    """Every SHARES-th configuration that is going to be timed."""
    from gpu_measure import CANDIDATES, candidates, first_of_classes

    module = importlib.import_module(f"pycircuit.kernels.{op}")
    for name, item in first_of_classes(op, device):
        for configuration in candidates(module, name)[share :: SHARES if device == "cuda" else CANDIDATES]:
            yield partial(module.run, configuration, *item.arguments())


def launches_of_trace(name: str, share: int, device: str) -> Iterator[Callable[[], Any]]:
    """A trace of two layers at a GPU shape's widths, in every SHARES-th precision."""
    from gpu_trace import TINY, precisions

    import pycircuit as pc
    from pycircuit.bench import models
    from pycircuit.bench.shapes import SHAPES

    small = {**TINY, "positions": 10} if device == "cpu" else {"layers": 2, "features": 2048}
    shape = replace(SHAPES[name], **small)
    chosen = precisions(device)[share::SHARES]
    if not chosen:
        return
    model, prompt = models.replacement(shape, device), models.prompt(shape.positions)
    for precision in chosen:
        yield partial(pc.attribute, model, prompt, max_features=8, progress=False, precision=precision)


LAUNCHES = {"op": launches_of_op, "tuning": launches_of_tuning, "trace": launches_of_trace}


def tasks(shares: range) -> list[tuple[str, str, int]]:
    """(kind, name, share), the longest first."""
    names = [("trace", name, share) for name in ("gemma2b", "gemma2b-clt", "gemma2b-ten") for share in shares]
    names += [("op", op, share) for op in OPS for share in shares]
    return names + [("tuning", op, share) for op in OPS[:2] for share in shares]


def compiled(task: tuple[str, str, int], device: str) -> dict[str, Any]:
    """Launch what a task has: its seconds, those spent compiling, what failed, what every kernel takes of a card."""
    kind, name, share = task
    compilations: list[float] = []
    if device == "cuda":
        triton.knobs.compilation.listener = partial(listen, compilations)
    begin, failed = time.perf_counter(), []
    for launch in LAUNCHES[kind](name, share, device):
        try:
            launch()
        except Exception as error:
            failed.append(reason(error))
    result: dict[str, Any] = {"seconds": time.perf_counter() - begin, "failed": failed}
    result |= {"compilations": len(compilations), "compiling seconds": sum(compilations)}
    if device == "cuda":
        result["kernels"] = attempt(resources)
    return result


def listen(compilations: list[float], *, times: Any, cache_hit: bool, **_: Any) -> None:
    """Triton's report of a compilation; what came from its cache does not count."""
    if not cache_hit:
        compilations.append(times.total / 1e6)


def resources() -> list[dict[str, Any]]:
    """What every kernel that this process launched takes: registers, spills, shared memory, warps."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("pycircuit.kernels")]
    functions = {id(f): f for m in modules for f in vars(m).values() if isinstance(f, triton.runtime.JITFunction)}
    kernels = [k for f in functions.values() for cache in f.device_caches.values() for k in cache[0].values()]
    return [
        {
            "kernel": k.metadata.name,
            "registers": k.n_regs,
            "spills": k.n_spills,
            "shared": k.metadata.shared,
            "warps": k.metadata.num_warps,
            "stages": k.metadata.num_stages,
        }
        for k in kernels
    ]


def compile_kernels(section: Section) -> None:
    """Save what every task compiled as it ends; in a dry run the interpreter runs a third of the launches."""
    names = tasks(range(1 if section.dry else SHARES))
    if section.dry:
        for task in names:
            _save(section, task, attempt(lambda t=task: compiled(t, section.device)))
        section.save("kernels", {"unavailable": "the interpreter compiles nothing"})
        return
    workers = max(1, min(len(names), (os.cpu_count() or 2) - 2))
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    futures = {pool.submit(compiled, task, section.device): task for task in names}
    for future in as_completed(futures):
        _save(section, futures[future], attempt(future.result))
    pool.shutdown(wait=False, cancel_futures=True)


def _save(section: Section, task: tuple[str, str, int], result: dict[str, Any]) -> None:
    name = " ".join(map(str, task))
    section.save(name, result)
    for why in [*result.get("failed", []), *filter(None, [result.get("unavailable")])]:
        section.mark(f"{name}: {why}")
