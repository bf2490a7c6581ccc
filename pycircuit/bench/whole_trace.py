"""Complete traces at a standard shape: times by phase, the law, and the sweep's share of the matrix rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import pycircuit as pc
from pycircuit.graph import Graph
from pycircuit.ops.dispatch import multiplies_bfloat16
from pycircuit.trace.precision import PRECISIONS

from . import cone, machine_rates, models
from .runner import spread
from .shapes import Shape

LAW = PRECISIONS["float32"].tolerance  # the certificate every float32 graph must meet before a time is given


@dataclass
class Traced:
    """Measurements of a trace.

    times: seconds of every run; timings: the phases of the median run; operations: of the causal cone; fewest: those
    of them that the sweep needs (cone.py).
    base, peak: bytes resident before the first run and at most during it; load, others: as in `Result`.
    """

    shape: str
    what: str
    threads: int
    times: list[float] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    active: int = 0
    rows: int = 0
    operations: float = 0.0
    fewest: float = 0.0
    certificate: float | None = None
    base: int | None = None
    peak: int | None = None
    load: float | None = None
    others: float | None = None

    @property
    def median(self) -> float:
        return median(self.times)

    @property
    def spread(self) -> float:
        return spread(self.times)

    def of_rate(self, rate: float, fewest: bool = False) -> float | None:
        """Useful operations of the sweep per second, over `rate`; None where phases are not known."""
        operations = self.fewest if fewest else self.operations
        return operations / self.timings["sweep"] / rate if operations and "sweep" in self.timings else None

    def shares(self) -> dict[str, float]:
        """Share of each phase in the total."""
        total = sum(self.timings.values())
        return {name: seconds / total for name, seconds in self.timings.items()}

    def add(self, seconds: float, timings: dict[str, float]) -> None:
        """Add a run; its phases replace the last ones if it is the median so far (the later of two)."""
        self.times.append(seconds)
        if len(self.times) < 3 or sorted(self.times)[len(self.times) // 2] == seconds:
            self.timings = dict(timings)

    def describe(self, graph: Graph, shape: Shape) -> None:
        self.active, self.rows = len(graph.features), graph.rows.count
        self.operations = cone.operations(shape, *cone.expanded(graph))
        self.fewest = cone.fewest(shape, *cone.expanded(graph))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(entry: dict[str, Any]) -> Traced:
    return Traced(**{name: value for name, value in entry.items() if name != "with_first_hop"})  # of older files


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def off(first: Graph, second: Graph) -> float:
    """Largest distance of two rows over the first's norm; infinite where the graphs expanded different rows."""
    if first.row_node.tolist() != second.row_node.tolist():
        return float("inf")
    a, b = first.to_scipy()[first.row_node.numpy()], second.to_scipy()[first.row_node.numpy()]
    distance = ((a - b).power(2).sum(1) / a.power(2).sum(1).clip(1e-30)) ** 0.5
    return float(distance.max())


def in_parts() -> list[str]:
    """Precisions beside float32 whose products this processor has instructions for."""
    return ["float32-fast", "bfloat16"] if multiplies_bfloat16() else []


def compare(shape: Shape, names: Sequence[str] | None = None, runs: int = 3) -> list[Traced]:
    """Measure a trace by each implementation or precision, in turn; AssertionError where one breaks the law or differs.

    names: None for native, the precisions of `in_parts`, and reference.
    """
    names = ["native", *in_parts(), "reference"] if names is None else names
    model, ids = models.replacement(shape), models.prompt(shape.positions)
    by_name = {name: Traced(shape.name, name, machine_rates.all_threads(), load=machine_rates.load()) for name in names}
    first: Graph | None = None
    others = machine_rates.Others()
    for turn in range(runs + 1):  # the first one warms up and checks, and is not counted
        for name, traced in by_name.items():
            precision = name if name in PRECISIONS else "float32"
            options: dict[str, Any] = {"max_features": shape.targets or "all", "precision": precision}
            with pc.use("native" if name in PRECISIONS else name):
                graph, seconds = clocked(partial(pc.attribute, model, ids, labels=False, progress=False, **options))
            if turn:
                traced.add(seconds, graph.timings)
                continue
            traced.certificate = graph.certificate
            law = PRECISIONS[precision].tolerance
            assert graph.certificate < law, f"{shape.name}, {name}: the law is {graph.certificate:.1e} off"
            if name in PRECISIONS:  # products are not of the matrix rate's type; close features may change places
                continue
            traced.describe(graph, shape)
            first = first or graph
            assert (worst := off(first, graph)) < 1e-4, f"{shape.name}, {name}: rows are {worst:.1e} off"
    for traced in by_name.values():
        traced.others = others.cores()
    return list(by_name.values())


HEADER = (
    "shape",
    "what",
    "runs",
    "median s",
    "spread s",
    "phases",
    "sweep of matrix rate",
    "x reference",
    "certificate",
    "load/others",
)


def phases(traced: Traced) -> str:
    shares = traced.shares()
    return ", ".join(f"{name} {seconds:.2f} s ({100 * shares[name]:.0f}%)" for name, seconds in traced.timings.items())


def shares_of(traced: Traced, rate: float) -> str:
    """Shares of the matrix rate, of the causal cone's operations and of the fewest; none above the rate itself."""
    share, least = traced.of_rate(rate), traced.of_rate(rate, fewest=True)
    if least is not None and least > 1:
        return f"REFUSED: {percent(least)} of {rate / 1e9:.0f} GFLOP/s; measure the rate again on a quiet machine"
    return f"{percent(share)} / {percent(least)}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def busy(traced: Traced) -> str:
    return "/".join("-" if n is None else f"{n:.1f}" for n in (traced.load, traced.others))


def cells(traced: Traced, reference: Traced | None, rate: float) -> tuple[str, ...]:
    """Cells of a row of the table, in HEADER's order."""
    return (
        traced.shape,
        traced.what,
        str(len(traced.times)),
        f"{traced.median:.2f}",
        f"{traced.spread:.2f}",
        phases(traced),
        shares_of(traced, rate),
        "-" if reference is None else f"{reference.median / traced.median:.2f}",
        f"{traced.certificate:.1e}",
        busy(traced),
    )


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *lines)]


def lines(traces: Sequence[Traced], rate: float) -> list[tuple[str, ...]]:
    reference = {t.shape: t for t in traces if t.what == "reference"}
    return [cells(t, reference.get(t.shape), rate) for t in traces]


def markdown(traces: Sequence[Traced], rate: float) -> str:
    """Section of RESULTS.md."""
    facts = machine_rates.facts()
    text = [
        "# End to end",
        "",
        "Written by `make bench`; do not edit. `pc.attribute` from token ids to graph, every op by one implementation,",
        "in turn in the same run. Before a time is taken the law holds to 1e-5 and both give the same rows to 1e-4.",
        "*float32-fast*, *bfloat16*: the native ops at this precision, where the processor multiplies bfloat16; the",
        "law holds to its tolerance, 1e-5 and 5e-3.",
        "*sweep of matrix rate*: the causal cone's operations over the sweep's time and this run's best matrix rate,",
        f"{rate / 1e9:.0f} GFLOP/s; then the same without the products that the ends of a target's path save, as close",
        "below 100% as a sweep can come. *load/others*: as above.",
        "",
        f"- torch {facts['torch']}, {facts['cpu']}, {facts['cores']} cores",
        "",
        *markdown_table(HEADER, lines(traces, rate)),
    ]
    return "\n".join(text) + "\n"
