"""Rates of the card and times of the ops: cold caches, CUDA events, medians; nothing is timed before it is right."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_shapes import Item, items
from pycircuit.kernels.config import Config

import pycircuit as pc
from pycircuit.ops import cases, reference
from pycircuit.ops.registry import OPS

FLUSH_BYTES = 256 * 2**20  # several times the last-level cache of any card today
TOLERANCE = 1e-5  # sums of up to 16,384 float32 terms
CHECKED = 64  # positions of an encode that are held against float64, at either end


@dataclass
class Timer:
    """Milliseconds of each run, every one from cold caches: a large buffer is written in between, untimed."""

    device: str
    deadline: float = float("inf")

    def __post_init__(self) -> None:
        size = FLUSH_BYTES if self.device == "cuda" else 4096
        self.flush = torch.empty(size, dtype=torch.int8, device=self.device)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def one(self, work: Callable[[], Any]) -> float:
        self.flush.zero_()
        if self.device == "cpu":
            begin = time.perf_counter()
            work()
            return 1000 * (time.perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def samples(self, work: Callable[[], Any], seconds: float = 1.5, most: int = 50) -> list[float]:
        """Two warm-ups (the first compiles), then samples until the time or the count is reached; at least three."""
        for _ in range(2 if self.device == "cuda" else 0):
            work()
        least, begin, found = (3 if self.device == "cuda" else 1), time.monotonic(), []
        while len(found) < least or (len(found) < most and time.monotonic() - begin < seconds and least > 1):
            found.append(self.one(work))
        return found


def measure_rates(timer: Timer) -> dict[str, float]:
    """TFLOP/s of the library's square products, GB/s of a copy counting what is read and what is written."""
    n = 8192 if timer.device == "cuda" else 64
    rates = {}
    for name, dtype, tf32 in (("fp32", "float32", False), ("tf32", "float32", True), ("bf16", "bfloat16", False)):
        a, b = (torch.randn(n, n, device=timer.device).to(getattr(torch, dtype)) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rates[name] = 2 * n**3 / median(timer.samples(lambda a=a, b=b: a @ b)) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(2**28 if timer.device == "cuda" else 2**12, device=timer.device)
    target = torch.empty_like(source)
    rates["copy"] = 2 * source.nbytes / median(timer.samples(lambda: target.copy_(source))) / 1e6
    return rates


def _head_and_tail(found: pc.Features, first: int, last: int) -> pc.Features:
    begin, end = int(found.row_ptr[first]), int(found.row_ptr[last])
    row_ptr = found.row_ptr[first : last + 1] - begin
    return pc.Features(row_ptr, found.index[begin:end], found.value[begin:end])


def deviation(item: Item, got: Any) -> float:
    """Relative error against float64; of an encode, of its first and last positions."""
    if item.op != "encode":
        return cases.error(item.op, got, cases.exact(item.op, item.arguments()), ())
    x, *rest = item.arguments()
    worst = 0.0
    for first in {0, max(len(x) - CHECKED, 0)}:
        args = (x[first : first + CHECKED], *rest[:-1], max(rest[-1] - first, 0))
        part = _head_and_tail(got, first, min(first + CHECKED, len(x)))
        worst = max(worst, cases.error("encode", part, cases.exact("encode", args), args))
    return worst


def _row(timer: Timer, item: Item, rates: dict[str, float]) -> dict[str, Any]:
    with pc.use("triton"):  # the public call checks the arguments, and that Triton is what runs
        got = getattr(pc.ops, item.op)(*item.arguments())
    assert pc.last_run() == pc.ops.Ran(item.op, "triton", None)
    try:
        error: float | str = deviation(item, got)
    except AssertionError as failed:
        error = str(failed)
    if not (isinstance(error, float) and error < TOLERANCE):
        return {"op": item.op, "shape": item.shape, "wrong": f"wrong, so not timed: {error}"}
    del got
    args = item.arguments()
    ours = timer.samples(lambda: OPS[item.op].form("triton")(*args))
    plain = median(timer.samples(lambda: getattr(reference, item.op)(*args), seconds=1, most=10))
    library = median(timer.samples(item.library)) if item.library else None
    ms, compute = median(ours), item.operations / rates[item.rate] / 1e9
    floor = max(compute, item.bytes / rates["copy"] / 1e6)
    return {
        "op": item.op, "shape": item.shape, "ms": ms, "samples_ms": ours, "spread": (max(ours) - min(ours)) / ms,
        "floor_ms": floor, "floor_is": "matrix" if compute == floor else "copy", "share_of_floor": floor / ms,
        "tflops": item.operations / ms / 1e9, "gbps": item.bytes / ms / 1e6, "reference_ms": plain,
        "reference_ratio": plain / ms, "library_ms": library, "library_ratio": library and library / ms, "error": error,
    }  # fmt: skip


def measure_op(timer: Timer, op: str, rates: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for item in items(op, timer.device):
        if timer.left() < 3:
            rows.append({"op": op, "shape": item.shape, "skipped": "no time left in this section"})
            continue
        rows.append(_row(timer, item, rates))
    return rows


def _one_a_class(op: str, device: str) -> Iterator[tuple[str, Item]]:
    """(shape class, its first item): the largest inputs come last, and are made only when asked for."""
    module, seen = importlib.import_module(f"pycircuit.kernels.{op}"), set()
    for item in items(op, device):
        name = item.shape_class(module)
        if name not in seen:
            seen.add(name)
            yield name, item


def tune(timer: Timer, op: str) -> list[dict[str, Any]]:
    """Every configuration of the pruned space for each shape class, the recorded choice first, as time allows."""
    rows, module = [], importlib.import_module(f"pycircuit.kernels.{op}")
    for at, (name, item) in enumerate(_one_a_class(op, timer.device)):
        args, chosen = item.arguments(), module.HOPPER[name]
        share, begin = timer.left() / max(len(module.HOPPER) - at, 1), time.monotonic()
        times: dict[Config, float] = {}
        for candidate in (chosen, *(c for c in module.SPACE if c != chosen)):
            if times and (time.monotonic() - begin > share or timer.device == "cpu"):
                break
            times[candidate] = median(timer.samples(partial(module.run, candidate, *args), seconds=0.2, most=10))
        best = min(times, key=times.__getitem__)
        rows.append({
            "op": op, "shape": f"{name}: {item.shape}", "tried": len(times), "best": str(best), "best_ms": times[best],
            "chosen": str(chosen), "chosen_ms": times[chosen], "times_ms": {str(c): t for c, t in times.items()},
        })  # fmt: skip
    return rows
