"""Rates of the card and times of the ops: cold caches, CUDA events, medians; nothing is timed before it is right."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_files import Section, attempt
from gpu_shapes import Item, items
from pycircuit.kernels.config import Config

import pycircuit as pc
from pycircuit.ops import cases, reference
from pycircuit.ops.registry import OPS
from pycircuit.ops.torch_settings import full_float32, tf32_products

FLUSH_BYTES = 256 * 2**20  # several times the last-level cache of any card today
TOLERANCE = 1e-5  # sums of up to 16,384 float32 terms
CANDIDATES = 8  # configurations of a shape class
TUNED = ("attend_back", "edge_scores")
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

    def milliseconds(self, work: Callable[[], Any]) -> float:
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

    def samples(self, work: Callable[[], Any], seconds: float = 0.7, most: int = 50) -> list[float]:
        """Two warm-ups (the first compiles), then samples until the time or the count is reached; at least three."""
        for _ in range(2 if self.device == "cuda" else 0):
            work()
        least, begin, samples = (3 if self.device == "cuda" else 1), time.monotonic(), []
        while len(samples) < least or (len(samples) < most and time.monotonic() - begin < seconds and least > 1):
            samples.append(self.milliseconds(work))
        return samples


def measure_rates(timer: Timer) -> dict[str, float]:
    """TFLOP/s of the library's square products, GB/s of a copy counting what is read and what is written."""
    n = 8192 if timer.device == "cuda" else 64
    rates = {}
    for name, dtype, tf32 in (("fp32", "float32", False), ("tf32", "float32", True), ("bf16", "bfloat16", False)):
        a, b = (torch.randn(n, n, device=timer.device).to(getattr(torch, dtype)) for _ in range(2))
        with tf32_products() if tf32 else full_float32():
            rates[name] = 2 * n**3 / median(timer.samples(lambda a=a, b=b: a @ b, seconds=0.5)) / 1e9
    source = torch.randn(2**28 if timer.device == "cuda" else 2**12, device=timer.device)
    target = torch.empty_like(source)
    rates["copy"] = 2 * source.nbytes / median(timer.samples(lambda: target.copy_(source))) / 1e6
    return rates


def _head_and_tail(features: pc.SparseFeatures, first: int, last: int) -> pc.SparseFeatures:
    begin, end = int(features.row_ptr[first]), int(features.row_ptr[last])
    row_ptr = features.row_ptr[first : last + 1] - begin
    return pc.SparseFeatures(row_ptr, features.index[begin:end], features.value[begin:end])


def deviation(item: Item, got: Any) -> float:
    """Relative error against float64; of an encode, of its first and last positions."""
    if item.op != "encode":
        return cases.error(item.op, got, cases.exact(item.op, item.arguments()), ())
    x, *others = item.arguments()
    worst = 0.0
    for first in {0, max(len(x) - CHECKED, 0)}:
        args = (x[first : first + CHECKED], *others[:-1], max(others[-1] - first, 0))
        compared = _head_and_tail(got, first, min(first + CHECKED, len(x)))
        worst = max(worst, cases.error("encode", compared, cases.exact("encode", args), args))
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
        return {"wrong": f"wrong, so not timed: {error}"}
    del got
    args = item.arguments()
    ours = timer.samples(lambda: OPS[item.op].form("triton")(*args))
    plain = median(timer.samples(lambda: getattr(reference, item.op)(*args), seconds=0.5, most=10))
    library = median(timer.samples(item.library)) if item.library else None
    ms, compute = median(ours), item.operations / rates[item.rate] / 1e9
    floor = max(compute, item.bytes / rates["copy"] / 1e6)
    return {
        "ms": ms,
        "samples_ms": ours,
        "spread": (max(ours) - min(ours)) / ms,
        "floor_ms": floor,
        "floor_is": "matrix" if compute == floor else "copy",
        "share_of_floor": floor / ms,
        "tflops": item.operations / ms / 1e9,
        "gbps": item.bytes / ms / 1e6,
        "reference_ms": plain,
        "reference_ratio": plain / ms,
        "library_ms": library,
        "library_ratio": library and library / ms,
        "error": error,
    }


def first_of_classes(op: str, device: str) -> Iterator[tuple[str, Item]]:
    """(shape class, its first item); the largest inputs come last, and are not made once every class was seen."""
    module, seen = importlib.import_module(f"pycircuit.kernels.{op}"), set()
    for item in items(op, device):
        name = item.shape_class(module)
        if name not in seen:
            seen.add(name)
            yield name, item
        if seen >= set(module.HOPPER):
            return


def ops(section: Section) -> None:
    """Two rows of every op, of different shape classes where it has several, with their share of the floor."""
    timer = Timer(section.device, section.deadline)
    rates = measure_rates(timer)
    section.save("rates", rates)
    rows: list[dict[str, Any]] = []
    for op in OPS:
        for _, item in itertools.islice(first_of_classes(op, section.device), 2):
            row: dict[str, Any] = {"op": op, "shape": item.shape}
            if timer.left() < 3:
                row["skipped"] = "no time left"
            else:
                row |= attempt(partial(_row, timer, item, rates))
            rows.append(row)
            section.save("rows", rows)
    for row in rows:
        if why := row.get("wrong") or row.get("unavailable"):
            section.mark(f"{row['op']} {row['shape']}: {why}")


def candidates(module: Any, name: str) -> list[Config]:
    """The recorded choice of a shape class and its nearest in the space: those that differ from it in the least."""
    chosen = module.HOPPER[name]

    def differences(c: Config) -> int:
        blocks = sum(c[key] != value for key, value in chosen.blocks)
        return blocks + (c.warps != chosen.warps) + (c.stages != chosen.stages)

    return sorted(dict.fromkeys((chosen, *module.SPACE)), key=differences)[:CANDIDATES]


def tune(section: Section) -> None:
    """Few configurations for every shape class of the two ops that the sweep waits for, the recorded choice first."""
    timer, rows = Timer(section.device, section.deadline), []
    for op in TUNED:
        module = importlib.import_module(f"pycircuit.kernels.{op}")
        for name, item in first_of_classes(op, section.device):
            row: dict[str, Any] = {"op": op, "class": name, "shape": item.shape, "times_ms": {}}
            rows.append(row)
            for candidate in candidates(module, name)[: 2 if section.dry else CANDIDATES]:
                if timer.left() < 2:
                    row["stopped"] = "no time left"
                    break
                row["times_ms"][str(candidate)] = attempt(partial(_milliseconds, timer, module, candidate, item))
                section.save("rows", rows)
            times = {text: ms for text, ms in row["times_ms"].items() if isinstance(ms, float)}
            row["recorded"], row["best"] = str(module.HOPPER[name]), min(times, key=times.__getitem__, default=None)
            section.save("rows", rows)


def _milliseconds(timer: Timer, module: Any, candidate: Config, item: Item) -> float:
    return median(timer.samples(partial(module.run, candidate, *item.arguments()), seconds=0.2, most=10))
