"""`pycircuit doctor` and `pycircuit bench`: this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pycircuit import doctor as machine_report
from pycircuit.bench import compare as comparison
from pycircuit.bench import machine_rates, report, tour
from pycircuit.bench.__main__ import run as run_bench
from pycircuit.bench.runner import Options
from pycircuit.ops.processor import processor_name
from pycircuit.ops.registry import IMPLEMENTATIONS

from .console import console, emit, table
from .options import AsJson

WRONG = 1  # exit code if an op's result is wrong

bench_app = typer.Typer(
    name="bench",
    invoke_without_command=True,
    add_completion=False,
    help="Measure the ops on this machine, or compare two runs.",
    epilog="Example: pycircuit bench --op encode --json mine.json",
)


def doctor(as_json: AsJson = False) -> None:
    """Describe this machine, measure its rates, and say which implementation each op would use on it and why."""
    report = machine_report.examine()
    if as_json:
        emit(report)
        return
    terminal = console()
    for name, value in machine_report.lines(report):
        terminal.print(f"[bold]{name:<11}[/bold]", value, highlight=False)
    rows = table("op", "device", "runs", "why not the others")
    for line in machine_report.op_lines(report):
        rows.add_row(*line)
    terminal.print(rows)
    rates = table("threads", "rate of", "measured now")
    for rate_line in machine_report.rate_lines(report):
        rates.add_row(*rate_line)
    terminal.print(rates)
    _warn_if_busy(terminal, report["others"])


def _warn_if_busy(terminal: Console, cores: float | None) -> None:
    if cores is not None and cores > machine_report.BUSY:
        terminal.print(f"Other programs took up to {cores:.1f} cores meanwhile: run it again when they are done.")


@bench_app.command("tour", epilog="Example: pycircuit bench tour")
def tour_ops() -> None:
    """Time every op once on a realistic input, with its share of this machine's floor and the implementation."""
    terminal, busy_cores = console(), 0.0
    rates = machine_rates.measure(machine_rates.all_threads(), seconds=0.1)
    terminal.print(f"{processor_name()}, {rates}", highlight=False)
    rows = table("op", "input", "ms", "rate", "of floor", "x PyTorch", "ran", "error")
    for op, description, result in tour.tour(rates):
        if not result.times:
            raise RuntimeError(f"{op}: {result.failed or result.skipped}")
        ran = result.implementation + (f" ({result.isa})" if result.isa else "")
        speed, share = report.rate(result), f"{100 * result.share:.0f}%"
        ratio = f"{result.ratio('reference'):.1f}"
        rows.add_row(op, description, f"{1e3 * result.median:.2f}", speed, share, ratio, ran, f"{result.error:.0e}")
        busy_cores = max(busy_cores, result.others or 0.0)
    terminal.print(rows)
    terminal.print("of floor: 100% is as fast as this machine can be. x PyTorch: the reference's time over ours.")
    terminal.print("error: against float64, checked before the timing.")
    _warn_if_busy(terminal, busy_cores)


@bench_app.callback()
def bench(
    context: typer.Context,
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    shape: Annotated[str | None, typer.Option(help="Only this shape.")] = None,
    row: Annotated[str | None, typer.Option(help="Only rows with this in their name.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few small rows, short samples.")] = False,
    threads: Annotated[str | None, typer.Option(help="For example 1 or 1,all.")] = None,
    implementation: Annotated[str, typer.Option(help=" | ".join(IMPLEMENTATIONS))] = "native",
    isa: Annotated[str | None, typer.Option(help="One table of the native module.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds of timed calls a row.", min=0.001)] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything here, samples included.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")] = None,
) -> None:
    """Measure the ops: check each against float64, then time it next to plain PyTorch."""
    if context.invoked_subcommand is not None:
        return
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"bench: implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    for path in (as_json, markdown):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"bench: {path} must be in a directory that exists, got {path.parent}")
    options = Options(implementation, isa, budget or (0.2 if quick else 1.0))
    session = run_bench(op, shape, row, quick, threads, options)
    if as_json is not None:
        session.save(as_json)
    if markdown is not None:
        markdown.write_text(report.markdown(session))
    if any(r.failed for r in session.results):
        raise typer.Exit(WRONG)


@bench_app.command(epilog="Example: pycircuit bench compare mine.json theirs.json")
def compare(first: Path, second: Path) -> None:
    """Compare two files of `pycircuit bench --json`, row by row."""
    left, right = report.load(first), report.load(second)
    lines = comparison.lines(left, right)
    if not lines:
        raise ValueError(f"bench: {second} must hold a row that {first} has, got none")
    terminal = console()
    for name, session in (("first", left), ("second", right)):
        facts = session.facts
        terminal.print(f"{name}: {facts['cpu']}, torch {facts['torch']}, {session.when}", highlight=False)
    rows = table(*comparison.HEADER)
    for line in lines:
        rows.add_row(*line)
    terminal.print(rows)
