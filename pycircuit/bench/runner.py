"""Measurement of a row: checked against float64, then timed, ours and its peers in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from statistics import median, quantiles
from typing import Any

from torch import Tensor

import pycircuit as pc
from pycircuit.ops import cases

from . import machine_rates
from .catalog import MATRIX, MEMORY, READ, Row, Target
from .inputs import Arguments, Inputs, Peer
from .machine_rates import Rates

# Sums of at most 100,000 float32 terms, by a kernel that adds in lanes and blocks: a few units of 2^-24 each way.
TOLERANCE = 5e-6

Drive = Callable[[Callable[[], Any], Callable[[], None], int], list[float]]


@dataclass(frozen=True)
class Options:
    """Options of a run; budget: seconds of timed calls per row for ours, and again for each of its peers."""

    implementation: str = "native"
    isa: str | None = None
    budget: float = 1.0
    most: int = 40
    least: int = 5


@dataclass(frozen=True)
class Outcome:
    """Target and the figure measured; limit: the figure of a call at its floor, for targets that are rates."""

    of: str
    least: float | None
    most: float | None
    got: float | None
    met: bool | None
    limit: float | None = None


@dataclass(frozen=True)
class Result:
    """Measurements of a row; times: seconds of every sample, ours under its implementation's name.

    load: the load average before; others: cores that other processes used during timing; best: the rates measured
    between its samples; memory: scratch beyond inputs and result, as a share of positions x features floats.
    """

    name: str
    op: str
    shape: str
    variant: str
    threads: int
    implementation: str
    isa: str | None
    load: float | None = None
    others: float | None = None
    operations: float = 0.0
    bytes: float = 0.0
    bfloat16: bool = False
    best: dict[str, float] = field(default_factory=dict)
    floor: float = 0.0
    bound: str = ""
    error: float | None = None
    memory: float | None = None
    times: dict[str, list[float]] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    skipped: str | None = None
    failed: str | None = None

    @property
    def median(self) -> float:
        return median(self.times[self.implementation])

    @property
    def spread(self) -> float:
        return spread(self.times[self.implementation])

    @property
    def share(self) -> float:
        """Share of the floor: 1 is as fast as this machine can be."""
        return self.floor / self.median

    def ratio(self, peer: str) -> float | None:
        """Median of the peer over ours: above 1 we are faster."""
        return median(self.times[peer]) / self.median if peer in self.times else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(entry: dict[str, Any]) -> Result:
    return replace(Result(**entry), outcomes=tuple(Outcome(**o) for o in entry["outcomes"]))


def spread(samples: list[float]) -> float:
    """Interquartile range."""
    if len(samples) < 2:
        return 0.0
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return high - low


def plain_drive(call: Callable[[], Any], before: Callable[[], None], rounds: int) -> list[float]:
    """Time `call` `rounds` times, each after an untimed `before`."""
    samples = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def measure(row: Row, threads: int, rates: Rates, options: Options, drive: Drive = plain_drive) -> Result:
    """Measure a row with `threads` threads; a wrong result is reported as failed, without a time."""
    blank = Result(
        row.name, row.op, row.shape, row.variant, threads, options.implementation, None, load=machine_rates.load()
    )
    free = machine_rates.available_memory()
    if free is not None and free < row.needs:
        return replace(blank, skipped=f"needs {row.needs / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")
    with machine_rates.threads_set(threads):
        inputs = row.build(cases.generator(7))
        first, took = _clock(_caller(row.op, options), copied(inputs.args))
        ran = pc.last_run()
        assert ran is not None
        error = _checked(row, inputs, first)
        if isinstance(error, str):
            return replace(blank, isa=ran.isa, failed=error)
        del first
        others = machine_rates.Others()
        with machine_rates.probe(rates) as probe:
            times = _times(row, inputs, took, options, drive, probe)
        result = replace(
            blank,
            isa=ran.isa,
            error=error,
            others=others.cores(),
            times=times,
            operations=inputs.operations,
            bytes=inputs.bytes,
            bfloat16=inputs.bfloat16,
            best=probe.best,
            memory=_scratch(inputs.args, options) if any(t.of == MEMORY for t in row.targets) else None,
        )
    result = judge(row, result, rates.raised(**result.best))
    return result if result.share <= 1 else _against_new_rates(row, result, rates)


def _against_new_rates(row: Row, result: Result, rates: Rates) -> Result:
    """Result against rates measured again next to it; without its times if it is above 100% of that floor too."""
    again = machine_rates.measure(rates.threads)
    best = {
        name: max(getattr(again, name), result.best.get(name, 0.0)) for name in ("float32", "bfloat16", "copy", "read")
    }
    raised = rates.raised(**best)
    result = judge(row, replace(result, best=best), raised)
    if result.share <= 1:
        return result
    matrix = result.bound == "matrix"
    work, rate = (result.operations, raised.matrix(result.bfloat16)) if matrix else (result.bytes, raised.memory)
    got, limit = (f"{value / 1e9:.1f} {'GFLOP/s' if matrix else 'GB/s'}" for value in (work / result.median, rate))
    source = f"pycircuit/bench/{'library_rates' if matrix else 'machine_rates'}.py"
    wrong = (
        f"its floor must be below its time, got {100 * result.share:.0f}% of the floor: {got} where the best "
        f"{result.bound} rate measured is {limit}; measure again on a quiet machine, or add what is faster to {source}"
    )
    return replace(result, failed=wrong, times={}, outcomes=())


def _scratch(args: Arguments, options: Options) -> float | None:
    """Scratch that native encode reports, as a share of positions x features floats; None for other forms."""
    if options.implementation != "native":
        return None
    from pycircuit.ops import native

    workspaces: list[int] = []
    ours: Any = native
    module = ours._native

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

        def encode(self, *arguments: Any) -> Any:
            result = module.encode(*arguments)
            workspaces.append(result.workspace_bytes)
            return result

    ours._native = Spy()
    try:
        _caller("encode", options)(*args)
    finally:
        ours._native = module
    x, w_enc = args[:2]
    return workspaces[0] / (4 * len(x) * len(w_enc))


def _checked(row: Row, inputs: Inputs, got: Any) -> float | str:
    """Error of a result, or a sentence on why it is wrong."""
    try:
        error = inputs.error(got)
    except AssertionError as wrong:
        return str(wrong)
    return error if error < TOLERANCE else f"error {error:.1e} is above {TOLERANCE:.0e}"


def _caller(op: str, options: Options) -> Callable[..., Any]:
    """Public op with one implementation forced: its time includes checks and dispatch."""
    run = getattr(pc.ops, op)

    def call(*args: Any) -> Any:
        with pc.use(options.implementation, isa=options.isa):
            return run(*args)

    return call


def _clock(call: Callable[..., Any], args: Arguments) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call(*args)
    return result, time.perf_counter() - start


def copied(args: Arguments) -> Arguments:
    """Copies of the arguments with equal strides (a slot of a cross-layer decoder stays a slot)."""
    return tuple(cases.convert(a, _copy) for a in args)


def _copy(t: Tensor) -> Tensor:
    return t.new_empty_strided(t.size(), t.stride()).copy_(t)


def _size(args: Arguments) -> int:
    total = 0

    def add(t: Tensor) -> Tensor:
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    for a in args:
        cases.convert(a, add)
    return total


def _rotation(args: Arguments, touched: float) -> Iterator[Arguments]:
    """Copies of the arguments in turn, twice the last-level cache in all, so that each is read from memory."""
    cache, most = 2 * machine_rates.last_level_cache(), 2e9 / max(_size(args), 1)
    copies = min(8, most, cache / touched) if touched else 0
    return cycle([args, *(copied(args) for _ in range(int(copies)))])


@dataclass
class _Turn:
    """Peer that is called before each of our samples until its budget is spent."""

    call: Callable[..., Any]
    sets: Iterator[Arguments]
    samples: list[float] = field(default_factory=list)

    def sample(self, budget: float) -> None:
        if (len(self.samples) >= 2 and sum(self.samples) > budget) or sum(self.samples) > 5 * budget:
            return
        self.samples.append(_clock(self.call, next(self.sets))[1])


def _times(
    row: Row, inputs: Inputs, took: float, options: Options, drive: Drive, probe: machine_rates.Probe
) -> dict[str, list[float]]:
    turns = {name: _turn(row, peer, inputs, options) for name, peer in inputs.peers.items()}
    ours, sets = _caller(row.op, options), _rotation(inputs.args, inputs.bytes * row.rotate)
    ready: list[Arguments] = [inputs.args]

    left = [8]

    def before() -> None:
        if left[0] > 0:
            left[0] -= 1
            probe.sample()
        for turn in turns.values():
            turn.sample(options.budget)
        ready[0] = next(sets)

    fit = int(options.budget / max(took, 1e-6))
    rounds = 1 if took > 5 * options.budget else max(options.least, min(options.most, fit))
    gc.collect()
    gc.disable()
    try:
        samples = drive(lambda: ours(*ready[0]), before, rounds)[:rounds]
    finally:
        gc.enable()
    return {options.implementation: samples, **{name: turn.samples for name, turn in turns.items()}}


def _turn(row: Row, peer: Peer, inputs: Inputs, options: Options) -> _Turn:
    """Prepare a peer: warm it with an untimed call, and check its result where it is comparable."""
    if callable(peer.run):
        call = peer.run
    else:
        call = _caller(row.op, options if peer.run == "same" else replace(options, implementation=peer.run, isa=None))
    args = inputs.args if peer.args is None else peer.args
    got = call(*copied(args))
    if peer.result is not None and (error := inputs.error(peer.result(got))) > 100 * TOLERANCE:
        raise AssertionError(f"{row.name}: a peer is wrong, error {error:.1e}")
    del got
    return _Turn(call, _rotation(args, inputs.bytes * row.rotate))


def judge(row: Row, result: Result, rates: Rates) -> Result:
    """Result with its floor at these rates and the outcomes of the row's targets."""
    if not result.times:
        return result
    matrix = rates.matrix(result.bfloat16)
    compute, traffic = result.operations / matrix, result.bytes / rates.memory
    bound = "matrix" if compute > traffic else "memory"
    result = replace(result, floor=max(compute, traffic), bound=bound)
    seconds = {MATRIX: compute, READ: result.bytes / rates.read}
    return replace(result, outcomes=tuple(_outcome(t, result, seconds) for t in row.targets))


def _outcome(target: Target, result: Result, seconds: dict[str, float]) -> Outcome:
    """Outcome of a target; seconds: the time of a call that runs at exactly the rate."""
    got, limit = result.ratio(target.of), None
    if target.of == MEMORY:
        got = result.memory
    elif target.of in seconds:
        got, limit = seconds[target.of] / result.median, seconds[target.of] / result.floor
    return Outcome(target.of, target.least, target.most, got, None if got is None else target.met(got), limit)
