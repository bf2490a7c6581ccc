"""Graphs of many prompts: one model, one prompt to each group of cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import islice

import torch
from torch import Tensor

from pycircuit.graph import Graph
from pycircuit.labels.automatic import Labels, check_labels
from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops.checks import is_int
from pycircuit.progress import Progress, Report

from .attribute import attribute
from .memory_plan import Bound
from .precision import Precision, arithmetic_of
from .targets import TargetList
from .trace_options import MaxFeatures, feature_limit


def attribute_many(
    model: ReplacementModel,
    prompts: Sequence[str | Sequence[int] | Tensor],
    *,
    targets: TargetList = None,
    max_features: MaxFeatures = None,
    position: int | Sequence[int] = -1,
    probability: float = 0.95,
    max_targets: int = 10,
    precision: Precision = "float32",
    memory: str | int | None = None,
    workers: int | None = None,
    progress: bool | Report = True,
    round_size: int | None = None,
    labels: Labels = True,
) -> Iterator[Graph]:
    """Yield the graph of each prompt, in their order, as they are done. Arguments as `attribute` takes them.

    Every prompt is checked before the first one runs. workers: prompts traced at a time, each on its share of the
    cores and of `memory`; None: one to a core on the CPU (short prompts leave cores idle otherwise), one on a GPU.
    With several workers one graph may be waiting for its reader, and has a share of `memory` of its own.
    """
    check_model("attribute_many", model)
    if isinstance(prompts, str | Tensor):
        raise TypeError(f"attribute_many: prompts must be a list of prompts, got one {type(prompts).__name__}")
    if workers is not None and (not is_int(workers) or workers < 1):
        raise ValueError(f"attribute_many: workers must be an int of at least 1, got {workers!r}")
    arithmetic_of("attribute_many", precision, model.device, model.dtype)
    feature_limit("attribute_many", max_features)
    check_labels("attribute_many", labels)
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

    def trace(prompt: Tensor) -> Graph:
        return attribute(
            model,
            prompt,
            targets=targets,
            max_features=max_features,
            position=position,
            probability=probability,
            max_targets=max_targets,
            precision=precision,
            memory=share,
            progress=False,
            round_size=round_size,
            labels=labels,
        )

    return _graphs(trace, ids, count, threads, ahead, Progress(progress))


def _graphs(
    trace: Callable[[Tensor], Graph], ids: list[Tensor], workers: int, threads: int, ahead: int, progress: Progress
) -> Iterator[Graph]:
    """Yield the graphs of prompts; no more than `ahead` of them are under way or wait for the reader."""

    def trace_on_share(prompt: Tensor) -> Graph:
        torch.set_num_threads(max(1, threads // workers))  # of this worker's own products
        return trace(prompt)

    waiting = iter(ids)
    progress.step("prompts", 0, len(ids), "prompts")
    with ThreadPoolExecutor(workers, thread_name_prefix="pycircuit") as pool:
        running: list[Future[Graph]] = []

        def submit() -> None:
            for prompt in islice(waiting, ahead - len(running)):
                running.append(pool.submit(copy_context().run, trace_on_share, prompt))

        try:
            submit()
            for done in range(len(ids)):
                graph = running.pop(0).result()
                submit()
                progress.step("prompts", done + 1, len(ids), "prompts")
                yield graph
        finally:
            for future in running:
                future.cancel()
            pool.shutdown(wait=True)
            torch.set_num_threads(threads)
            progress.close()
