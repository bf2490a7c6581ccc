"""Verdicts and tables of the comparison with circuit-tracer."""

from __future__ import annotations

from typing import Any

from circuit_tracer_cases import CIRCUIT_TRACER, DROP_IN, FAST, Case, Compared

from pycircuit.bench import machine_rates, whole_trace
from pycircuit.bench.whole_trace import Traced

MEMORY_4K = 6e9  # bytes at most, for 4,096 positions


def _unsure(*timed: Traced) -> str:
    """Warning for times taken while other processes kept more than a fifth of a core busy."""
    return ", NOT TO BE TRUSTED, the machine was busy" if any((t.others or 0) > 0.2 for t in timed) else ""


def _verdict(what: str, got: float, bound: float, text: str, most: bool = False) -> str:
    met = got <= bound if most else got >= bound
    limit = text.format(bound)
    return f"{what}: {text.format(got)} ({'<=' if most else '>='} {limit}: {'met' if met else 'MISSED'})"


def verdicts(compared: Compared, rate: float) -> list[str]:
    """One line for each target of the plan: the figure, the bound, met or MISSED."""
    plan, cases = compared.plan, compared.cases
    name = plan.shape.name
    out: list[str] = []
    for i, batch in enumerate(plan.batches):
        theirs, ours = (cases[Case(name, what, batch).name] for what in (CIRCUIT_TRACER, "native"))
        least = plan.least[i] if i < len(plan.least) else 0.0
        out.append(
            _verdict(f"{ours.what} over {CIRCUIT_TRACER}", theirs.median / ours.median, least, "{:.1f}x")
            + _unsure(theirs, ours)
        )
    first = plan.batches[0] if plan.batches else 0
    ours = cases[Case(name, "native", first).name]
    if plan.reference is not None:
        plain = cases[Case(name, "reference", first).name]
        out.append(
            _verdict(f"{ours.what} over reference", plain.median / ours.median, plan.reference, "{:.2f}x")
            + _unsure(plain, ours)
        )
    if plan.drop_in is not None:
        theirs, swapped = (cases[Case(name, what, first).name] for what in (CIRCUIT_TRACER, DROP_IN))
        ratio = theirs.median / swapped.median
        out.append(
            _verdict(f"{DROP_IN} over {CIRCUIT_TRACER}", ratio, plan.drop_in, "{:.1f}x") + _unsure(theirs, swapped)
        )
    fast = cases.get(Case(name, FAST, first).name)
    if plan.fast is not None and fast is not None:
        theirs = cases[Case(name, CIRCUIT_TRACER, first).name]
        ratio = theirs.median / fast.median
        out.append(_verdict(f"{fast.what} over {CIRCUIT_TRACER}", ratio, plan.fast, "{:.1f}x") + _unsure(theirs, fast))
    if plan.rate is not None:
        out.append(
            _verdict(f"{ours.what}, sweep of the matrix rate", ours.of_rate(rate) or 0, plan.rate, "{:.0%}")
            + _unsure(ours)
        )
    if plan.phase is not None:
        phase, share = max(((k, v) for k, v in ours.shares().items() if k != "sweep"), key=lambda item: item[1])
        out.append(_verdict(f"{ours.what}, largest other phase ({phase})", share, plan.phase, "{:.0%}", most=True))
    if plan.memory is not None:
        theirs = cases[Case(name, CIRCUIT_TRACER, first).name]
        if ours.peak and theirs.peak:
            share = ours.peak / theirs.peak
            out.append(_verdict(f"{ours.what}, peak memory of the peer's", share, plan.memory, "{:.0%}", most=True))
    if not plan.batches and ours.peak:
        out.append(_verdict(f"{ours.what}, peak memory", ours.peak / 1e9, MEMORY_4K / 1e9, "{:.2f} GB", most=True))
    return out


HEADER = (
    "case",
    "runs",
    "median s",
    "spread s",
    "peer over ours",
    "phases",
    "sweep of matrix rate",
    "peak GB",
    "over start GB",
    "certificate",
    "same active / chosen / rows off",
    "load/others",
)


def _gigabytes(value: int | None, less: int | None = 0) -> str:
    return "-" if value is None or less is None else f"{(value - less) / 1e9:.2f}"


def table_row(compared: Compared, t: Traced, rate: float) -> tuple[str, ...]:
    peer = compared.cases.get("/".join([compared.plan.shape.name, CIRCUIT_TRACER, *t.what.split("/")[2:]]))
    ratio = f"{peer.median / t.median:.1f}x" if peer and peer is not t and compared.right else "-"
    agreed = compared.agreements.get(t.what)
    agreed_text = f"{agreed['active']:.4%} / {agreed['chosen']:.2%} / {agreed['rows']:.1e}" if agreed else "-"
    certificate = "-" if t.certificate is None else f"{t.certificate:.1e}"
    phases, share = (whole_trace.phases(t), whole_trace.shares_of(t, rate)) if t.timings else ("-", "-")
    return (
        t.what,
        str(len(t.times)),
        f"{t.median:.2f}",
        f"{t.spread:.2f}",
        ratio,
        phases,
        share,
        _gigabytes(t.peak),
        _gigabytes(t.peak, t.base),
        certificate,
        agreed_text,
        whole_trace.busy(t),
    )


def markdown(compared: list[Compared], rates: machine_rates.Rates) -> str:
    """Section of RESULTS.md."""
    facts = machine_rates.facts()
    lines = [
        "# Against circuit-tracer 0.5.0 (the package, a fork of upstream's v0.4.1)",
        "",
        "Written by `make bench-peers`; do not edit. circuit-tracer 0.5.0 and pycircuit with the same weights, targets",
        "and rounds, float32 (float32-fast: ours with precision='float32-fast', where the processor multiplies",
        "bfloat16), every case in a process of its own, after a warm-up on eight tokens. A",
        "ratio is given only where both chose the same features (99%: float32 decides ties) and their rows agree to",
        "1e-4 of the norm (the reference's are held against the native ones). So that they can be compared ours leaves",
        "out the errors of the first position, as the peer does; the certificate is of another run with all of them.",
        "*drop-in*: the peer's own model and transcoders, and its `Graph`, by pycircuit.integrations.circuit_tracer.",
        "Peak memory is what the first timed run reached, in all and over what was resident before it. *sweep of",
        "matrix rate*: causal-cone operations, and those of them that a sweep needs, over the best matrix rate here.",
        "",
        f"- torch {facts['torch']}, Python {facts['python']}, {facts['cpu']}, {facts['cores']} cores",
        f"- {rates}",
    ]
    lines += [f"- {verdict}" for shape in compared for verdict in shape.verdicts]
    lines += [
        f"- {shape.plan.shape.name}: WRONG, no ratio: {shape.agreements}" for shape in compared if not shape.right
    ]
    table = [table_row(shape, t, rates.float32) for shape in compared for t in shape.cases.values()]
    return "\n".join([*lines, "", *whole_trace.markdown_table(HEADER, table)]) + "\n"


def as_json(compared: list[Compared], rates: machine_rates.Rates) -> dict[str, Any]:
    shapes = {
        shape.plan.shape.name: {
            "cases": [t.as_json() for t in shape.cases.values()],
            "agreements": shape.agreements,
            "verdicts": shape.verdicts,
        }
        for shape in compared
    }
    return {"machine": machine_rates.facts(), "rates": machine_rates.as_json(rates), "shapes": shapes}
