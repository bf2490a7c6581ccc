"""Command line of the benchmarks: `python -m pycircuit.bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pycircuit as pc
from pycircuit.ops.registry import IMPLEMENTATIONS, OPS
from pycircuit.ops.threads import check_threads

from . import machine_rates, report
from .catalog import ROWS, select
from .report import Report
from .runner import Options, Result
from .session import Session, plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pycircuit.bench", description="Measure the ops on this machine.")
    parser.add_argument("--op", choices=list(OPS), help="only this op")
    parser.add_argument("--shape", help="only this shape: " + ", ".join(dict.fromkeys(r.shape for r in ROWS)))
    parser.add_argument("--row", help="only rows whose name contains this, for example b64-ragged")
    parser.add_argument("--quick", action="store_true", help="a few small rows, short samples")
    parser.add_argument("--threads", help="for example 1 or 1,all; default all, and 1 for cheap rows")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="native")
    parser.add_argument("--isa", help="one table of the native module: baseline, v3, v4, bf16 or amx")
    parser.add_argument("--budget", type=float, help="seconds of timed calls a row")
    parser.add_argument("--json", type=Path, help="write everything, every sample included")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    return parser


def thread_counts(text: str | None) -> list[int] | None:
    """Numbers of threads in a text such as '1,all'; ValueError for anything else."""
    if text is None:
        return None
    counts = []
    for word in text.split(","):
        if word != "all" and not (word.isdigit() and int(word) > 0):
            raise ValueError(f"bench: threads must be positive numbers or 'all', comma-separated, got {text!r}")
        counts.append(machine_rates.all_threads() if word == "all" else check_threads("bench", "--threads", int(word)))
    return list(dict.fromkeys(counts))


def run(
    op: str | None = None,
    shape: str | None = None,
    name: str | None = None,
    quick: bool = False,
    threads: str | None = None,
    options: Options | None = None,
) -> Report:
    """Measure every row and print it at once."""
    rows, counts = select(op, shape, name, quick), thread_counts(threads)
    options = options or Options()
    with pc.use(options.implementation, isa=options.isa):
        pass  # an impossible choice is refused before anything is measured
    session = Session(options, seconds=0.2 if quick else 0.6)
    for row, count in plan(rows, counts):
        if count not in session.rates:
            print(session.rate(count), flush=True)
        _print(row.name, session, session.run(row, count))
    print(report.tally(session.results))
    return session.report()


def _print(name: str, session: Session, result: Result) -> None:
    named = dict(zip(report.HEADER, report.cells(result), strict=True))
    if result.failed or result.skipped:
        print(f"{name}: {named['peers and targets']}", flush=True)
        return
    print(
        f"{name} [{named['threads']}, {named['ran']}]: {named['median ms']} ms ({named['rate']}, {named['of floor']} "
        f"of floor), {named['x reference']}x reference; {named['peers and targets']}; error {named['error']}; "
        f"load/others {named['load/others']}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.list:
            for row in select(options.op, options.shape, options.row, options.quick):
                print(row.name, *(f"[{t}]" for t in row.targets))
            return 0
        run_options = Options(options.implementation, options.isa, options.budget or (0.2 if options.quick else 1.0))
        measured = run(options.op, options.shape, options.row, options.quick, options.threads, run_options)
    except ValueError as wrong:
        print(wrong, file=sys.stderr)
        return 2
    if options.json:
        measured.save(options.json)
    return 1 if any(r.failed for r in measured.results) else 0


if __name__ == "__main__":
    sys.exit(main())
