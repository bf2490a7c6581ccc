"""Report of a run: JSON, a table for the terminal, and RESULTS.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pycircuit as pc

from . import machine_rates
from .catalog import MATRIX, MEMORY, READ
from .machine_rates import Rates
from .runner import Outcome, Result, from_json

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """Results of a run on a machine."""

    facts: dict[str, Any]
    rates: dict[int, Rates]
    results: list[Result]
    version: str = ""
    when: str = ""

    @staticmethod
    def of(rates: dict[int, Rates], results: list[Result]) -> Report:
        when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        return Report(machine_rates.facts(), rates, results, pc.__version__, when)

    def save(self, path: Path) -> None:
        document = {
            "schema": SCHEMA,
            "version": self.version,
            "when": self.when,
            "machine": self.facts,
            "rates": [machine_rates.as_json(r) for r in self.rates.values()],
            "rows": [r.as_json() for r in self.results],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(document), indent=1) + "\n")


def load(path: Path) -> Report:
    """Load a saved run; ValueError where the file is not one."""
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise ValueError(f"bench: {path} must have schema {SCHEMA}, got {document['schema']}; measure again")
        rates = {r["threads"]: Rates(**r) for r in document["rates"]}
        results = [from_json(r) for r in document["rows"]]
        return Report(document["machine"], rates, results, document["version"], document["when"])
    except (KeyError, TypeError, json.JSONDecodeError) as wrong:
        raise ValueError(f"bench: {path} must be a file that `pycircuit bench --json` wrote, got {wrong!r}") from None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


HEADER = (
    "row",
    "threads",
    "ran",
    "median ms",
    "spread ms",
    "rate",
    "of floor",
    "x reference",
    "peers and targets",
    "error",
    "load/others",
)


def cells(result: Result) -> tuple[str, ...]:
    """Cells of a row of the table, in HEADER's order."""
    ran = result.isa or result.implementation
    if result.failed or result.skipped:
        why = f"WRONG: {result.failed}" if result.failed else f"skipped: {result.skipped}"
        return (result.name, str(result.threads), ran, *("-",) * 5, why, "-", _load(result))
    reference = result.ratio("reference")
    return (
        result.name,
        str(result.threads),
        ran,
        _ms(result.median),
        _ms(result.spread),
        rate(result),
        f"{100 * result.share:.0f}%",
        f"{reference:.2f}" if reference else "-",
        "; ".join(_notes(result)),
        f"{result.error:.1e}",
        _load(result),
    )


def _load(result: Result) -> str:
    """Load average, and the cores that other processes used during timing."""
    return "/".join("-" if n is None else f"{n:.1f}" for n in (result.load, result.others))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def rate(result: Result) -> str:
    if result.bound == "matrix":
        return f"{result.operations / result.median / 1e9:.1f} GFLOP/s"
    return f"{result.bytes / result.median / 1e9:.1f} GB/s"


def amount(of: str, got: float) -> str:
    return f"{100 * got:.1f}%" if of in (MATRIX, READ, MEMORY) else f"{got:.2f}x"


def _bound(outcome: Outcome) -> str:
    sign, value = (">=", outcome.least) if outcome.least is not None else ("<=", outcome.most)
    assert value is not None
    return f"{sign} {amount(outcome.of, value)}"


def describe(outcome: Outcome) -> str:
    got = "not measured" if outcome.got is None else amount(outcome.of, outcome.got)
    verdict = {True: "met", False: "MISSED", None: "open"}[outcome.met]
    if outcome.met is False and outcome.limit is not None and outcome.limit < 0.995:
        verdict += f", the floor allows {amount(outcome.of, outcome.limit)}"
    return f"{outcome.of} {got} ({_bound(outcome)}: {verdict})"


def _notes(result: Result) -> list[str]:
    """Outcomes of targets, then ratios to the peers that no target names."""
    named = {o.of for o in result.outcomes} | {result.implementation, "reference"}
    others = [f"{peer} {result.ratio(peer):.2f}x" for peer in result.times if peer not in named]
    return [describe(o) for o in result.outcomes] + others


def table(results: Iterable[Result]) -> str:
    """Aligned columns for a terminal."""
    lines = [HEADER, *(cells(r) for r in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def tally(results: Iterable[Result]) -> str:
    outcomes = [o for r in results for o in r.outcomes]
    met, missed = (sum(o.met is v for o in outcomes) for v in (True, False))
    return f"{met} of {len(outcomes)} targets met, {missed} missed, {len(outcomes) - met - missed} not measured"


def markdown(report: Report) -> str:
    """Section of RESULTS.md, with missed targets."""
    facts = report.facts
    lines = [
        "# Results",
        "",
        "Written by `make bench`; do not edit. Every row was checked against float64 before it was timed. Times are",
        "medians, spread is the interquartile range, ours and its peers were called in turn in the same run.",
        "The floor is the larger of least operations over the matrix rate and least bytes over the memory rate, both",
        "measured below in this run and again between the samples of every row; *of floor* 100% would be as fast as",
        "this machine can be, and a row above it gets no time. The matrix rate is float32's; encode's is bfloat16's",
        "where the processor multiplies such numbers (*amx*). *x reference* is the reference's time over ours.",
        "*load/others*: the load average, and the cores other processes used meanwhile; a row with others above 0.2",
        "is not to be trusted.",
        "",
        f"- {report.when}, pycircuit {report.version}, torch {facts['torch']}, Python {facts['python']}",
        f"- {facts['cpu']}, {facts['cores']} cores, {facts['system']}, built with {facts['compiler']}, "
        f"ISAs {', '.join(facts['isas'])}",
        *(f"- {rates}" for rates in report.rates.values()),
        f"- {tally(report.results)}",
        "",
        *_machine(report.rates.values()),
    ]
    for op in dict.fromkeys(r.op for r in report.results):
        lines += [f"## {op}", "", _markdown_row(HEADER), _markdown_row(("---",) * len(HEADER))]
        lines += [_markdown_row(cells(r)) for r in report.results if r.op == op]
        lines.append("")
    missed = [(r, o) for r in report.results for o in r.outcomes if not o.met]
    lines += ["## Targets not met", ""]
    lines += [f"- {r.name}, {r.threads} thread{'s' * (r.threads > 1)}: {describe(o)}" for r, o in missed] or ["None."]
    return "\n".join(lines) + "\n"


def _machine(rates: Iterable[Rates]) -> list[str]:
    """Section of the machine's own rates; nothing for a run that measured one library only."""
    measured = [r for r in rates if r.products]
    if not measured:
        return []
    sizes = list(dict.fromkeys(size for r in measured for by_size in r.products.values() for size in by_size))
    lines = [
        "## The machine",
        "",
        "float32 products [rows x depth x columns] by every library present, GFLOP/s; the matrix rate is the best of",
        "them. *in registers*: multiply-adds of the native core with no memory, by instruction set (the baseline has",
        "no fused ones). The memory rate is the better of a copy and a read; reads are the best of torch's sum and dot",
        "and of a sum by the native core over eight streams a thread.",
        "",
        _markdown_row(("threads", "library", *sizes)),
        _markdown_row(("---",) * (len(sizes) + 2)),
    ]
    for r in measured:
        for library, by_size in r.products.items():
            rates_of_sizes = (f"{by_size[size] / 1e9:.0f}" if size in by_size else "-" for size in sizes)
            lines.append(_markdown_row((str(r.threads), library, *rates_of_sizes)))
    lines += ["", _markdown_row(("threads", *MACHINE_HEADER)), _markdown_row(("---",) * (len(MACHINE_HEADER) + 1))]
    lines += [_markdown_row((str(r.threads), *machine_cells(r))) for r in measured]
    return [*lines, ""]


MACHINE_HEADER = ("in registers, GFLOP/s", "best product", "bfloat16", "copy GB/s", "read GB/s")


def machine_cells(rates: Rates) -> tuple[str, ...]:
    """Cells of a machine's rates, in MACHINE_HEADER's order."""
    registers = ", ".join(f"{isa} {rate / 1e9:.0f}" for isa, rate in rates.multiply_adds.items())
    of_peak = f", {100 * rates.float32 / rates.peak:.0f}% of the best in registers" if rates.peak else ""
    return (
        registers or "-",
        f"{rates.float32 / 1e9:.0f} by {rates.fastest}{of_peak}",
        f"{rates.bfloat16 / 1e9:.0f}",
        f"{rates.copy / 1e9:.1f}",
        f"{rates.read / 1e9:.1f}",
    )


def _markdown_row(row: Iterable[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in row) + " |"
