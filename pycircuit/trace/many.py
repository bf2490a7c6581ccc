"""Graphs of many prompts: one model, one prompt to each group of cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pycircuit.graph import Graph
from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops.checks import is_int
from pycircuit.progress import Progress, Report

from .attribute import attribute
from .memory_plan import Bound
from .precision import arithmetic_of


def attribute_many(
    model: ReplacementModel,
    prompts: Sequence[str | Sequence[int] | Tensor],
    workers: int | None = None,
    memory: str | int | None = None,
    progress: bool | Report = True,
    **options: Any,
) -> Iterator[Graph]:
    """The graph of each prompt, in their order, as they are done; options as `attribute` takes them.

    Every prompt is checked before the first one runs. workers: prompts traced at a time, each on its share of the
    cores and of `memory`; None: one to a core on the CPU (short prompts leave cores idle otherwise), one on a GPU.
    With several workers one graph may be waiting for its reader, and has a share of `memory` of its own.
    """
    check_model("attribute_many", model)
    if isinstance(prompts, str | Tensor):
        raise TypeError(f"attribute_many: prompts must be a list of prompts, got one {type(prompts).__name__}")
    if "checkpoint" in options:
        raise ValueError("attribute_many: checkpoint must be given to attribute, prompt by prompt")
    if workers is not None and (not is_int(workers) or workers < 1):
        raise ValueError(f"attribute_many: workers must be an int of at least 1, got {workers!r}")
    arithmetic_of("attribute_many", options.get("precision", "float32"), model.device, model.dtype)
    ids = []
    for i, prompt in enumerate(prompts):
        try:
            ids.append(model.tokens(prompt))
        except (TypeError, ValueError) as error:
            raise type(error)(f"attribute_many: prompts[{i}]: {error}") from None
    threads = torch.get_num_threads()
    count = int(workers or 0) or (threads if model.device.type == "cpu" else 1)
    count = max(1, min(count, len(ids)))
    ahead = count + (count > 1)  # prompts under way, and graphs that wait for their reader
    share = max(1, Bound.of(memory, model.device).bytes // ahead)
    return _graphs(model, ids, count, ahead, threads, share, Progress(progress), options)


def _graphs(
    model: ReplacementModel,
    ids: list[Tensor],
    workers: int,
    ahead: int,
    threads: int,
    share: int,
    show: Progress,
    options: Any,
) -> Iterator[Graph]:
    """A generator: no more than `ahead` prompts are under way or wait for the reader, each within its share."""

    def one(prompt: Tensor) -> Graph:
        torch.set_num_threads(max(1, threads // workers))  # of this worker's own products
        return attribute(model, prompt, memory=share, progress=False, **options)

    waiting = iter(ids)
    show.step("prompts", 0, len(ids), "prompts")
    with ThreadPoolExecutor(workers, thread_name_prefix="pycircuit") as pool:
        running: list[Future[Graph]] = []

        def submit() -> None:
            for prompt in islice(waiting, ahead - len(running)):
                running.append(pool.submit(copy_context().run, one, prompt))

        try:
            submit()
            for done in range(len(ids)):
                graph = running.pop(0).result()
                submit()
                show.step("prompts", done + 1, len(ids), "prompts")
                yield graph
        finally:
            for future in running:
                future.cancel()
            pool.shutdown(wait=True)
            torch.set_num_threads(threads)
            show.close()
