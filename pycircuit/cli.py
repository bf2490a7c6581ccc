"""The command line: `pycircuit demo | doctor | bench`. The only module that needs typer and rich."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import pycircuit as pc

from . import doctor as machine_report
from .bench import compare as comparison
from .bench import machine, report, tour
from .bench.__main__ import run as run_bench
from .bench.runner import Options
from .ops.registry import IMPLEMENTATIONS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=pc.__doc__)
bench_app = typer.Typer(invoke_without_command=True, help="Measure the ops on this machine, or compare two runs.")
app.add_typer(bench_app, name="bench")

WRONG, USAGE, STOPPED = 1, 2, 130  # something failed; the arguments were wrong; Ctrl-C
BUSY = 0.3  # cores taken by others from which a timing says little
UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]  # typer may carry its own click


def _console() -> Console:
    """As wide as the terminal; into a pipe, as wide as the text."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def _table(*header: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, no_wrap=i == 0)
    return table


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        print(pc.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """What this machine has, and which implementation each op would use here and why."""
    found = machine_report.examine()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = _console()
    for what, value in machine_report.lines(found):
        console.print(f"[bold]{what:<11}[/bold]", value, highlight=False)
    table = _table("op", "device", "runs", "why not the others")
    for line in machine_report.op_lines(found):
        table.add_row(*line)
    console.print(table)


@app.command()
def demo() -> None:
    """Every op once on a realistic input: its time, its share of this machine's floor, and what ran."""
    console, others = _console(), 0.0
    rates = machine.measure(machine.all_threads(), seconds=0.1)
    console.print(f"{machine.cpu_model()}, {rates}", highlight=False)
    table = _table("op", "given", "ms", "rate", "of floor", "x PyTorch", "ran", "error")
    for op, given, result in tour.tour(rates):
        if not result.times:
            raise RuntimeError(f"{op}: {result.failed or result.skipped}")
        ran = result.implementation + (f" ({result.isa})" if result.isa else "")
        speed, share = report.rate(result), f"{100 * result.share:.0f}%"
        ratio = f"{result.ratio('reference'):.1f}"
        table.add_row(op, given, f"{1e3 * result.median:.2f}", speed, share, ratio, ran, f"{result.error:.0e}")
        others = max(others, result.others or 0.0)
    console.print(table)
    console.print("of floor: 100% is as fast as this machine can be. x PyTorch: the reference's time over ours.")
    console.print("error: against float64, checked before the timing.")
    if others > BUSY:
        console.print(f"Other programs took up to {others:.1f} cores meanwhile: run it again when they are done.")


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
    """Measure op by op: each is checked against float64, then timed next to plain PyTorch."""
    if context.invoked_subcommand is not None:
        return
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"bench: implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    for path in (as_json, markdown):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"bench: {path} must be in a directory that exists, got {path.parent}")
    options = Options(implementation, isa, budget or (0.2 if quick else 1.0))
    found = run_bench(op, shape, row, quick, threads, options)
    if as_json is not None:
        found.save(as_json)
    if markdown is not None:
        markdown.write_text(report.markdown(found))
    if any(r.failed for r in found.results):
        raise typer.Exit(WRONG)


@bench_app.command()
def compare(first: Path, second: Path) -> None:
    """Two files that `pycircuit bench --json` wrote, row by row."""
    left, right = report.load(first), report.load(second)
    rows = comparison.lines(left, right)
    if not rows:
        raise ValueError(f"bench: {second} must hold a row that {first} has, got none")
    console = _console()
    for name, found in (("first", left), ("second", right)):
        console.print(f"{name}: {found.facts['cpu']}, torch {found.facts['torch']}, {found.when}", highlight=False)
    table = _table(*comparison.HEADER)
    for line in rows:
        table.add_row(*line)
    console.print(table)


def main() -> None:
    """Errors are one sentence and an exit code; the traceback is for --debug."""
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except BrokenPipeError:  # `pycircuit doctor | head -1`: whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        print(f"pycircuit: {_sentence(error)}", file=sys.stderr)
        code = USAGE if isinstance(error, UsageError | ValueError | TypeError | OSError) else WRONG
    sys.exit(code or 0)


def _sentence(error: Exception) -> str:
    if isinstance(error, UsageError):
        return f"{error.format_message()} See `pycircuit --help`."  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | TypeError | OSError | RuntimeError):
        return str(error)
    return f"{type(error).__name__}: {error}; run it again with `pycircuit --debug` for the traceback"
