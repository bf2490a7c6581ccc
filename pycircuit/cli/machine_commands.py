"""`pycircuit demo`, `pycircuit doctor` and `pycircuit bench`: this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pycircuit import doctor as machine_report
from pycircuit.bench import compare as comparison
from pycircuit.bench import machine_rates, report, tour
from pycircuit.bench.__main__ import run as run_bench
from pycircuit.bench.runner import Options
from pycircuit.ops.registry import IMPLEMENTATIONS

from .console import console, emit, table
from .options import AsJson, new_file

WRONG = 1  # the exit code where an op's answer is
BUSY = 0.3  # cores taken by others from which a timing says little


def doctor(as_json: AsJson = False) -> None:
    """What this machine has, and which implementation each op would use here and why."""
    found = machine_report.examine()
    if as_json:
        emit(found)
        return
    show = console()
    for what, value in machine_report.lines(found):
        show.print(f"[bold]{what:<11}[/bold]", value, highlight=False)
    rows = table("op", "device", "runs", "why not the others")
    for line in machine_report.op_lines(found):
        rows.add_row(*line)
    show.print(rows)


def demo(
    city: Annotated[str, typer.Option(help="The city asked about.")] = "Dallas",
    other: Annotated[str, typer.Option(help="The city whose state stands in for that one's.")] = "Oakland",
    svg: Annotated[Path | None, typer.Option("--plot", help="Where the picture goes; none is drawn without.")] = None,
    as_json: AsJson = False,
) -> None:
    """The demo model: a question of two hops, its circuit, and what is said with another state's features."""
    from pycircuit.demo.demonstration import run

    if svg is not None:
        new_file("--plot", svg, ".svg")
    show = console(stderr=as_json)
    found = run(show, city, other, svg)
    if as_json:
        emit(found)


def tour_ops() -> None:
    """Every op once on a realistic input: its time, its share of this machine's floor, and what ran."""
    show, others = console(), 0.0
    rates = machine_rates.measure(machine_rates.all_threads(), seconds=0.1)
    show.print(f"{machine_rates.cpu_model()}, {rates}", highlight=False)
    rows = table("op", "given", "ms", "rate", "of floor", "x PyTorch", "ran", "error")
    for op, given, result in tour.tour(rates):
        if not result.times:
            raise RuntimeError(f"{op}: {result.failed or result.skipped}")
        ran = result.implementation + (f" ({result.isa})" if result.isa else "")
        speed, share = report.rate(result), f"{100 * result.share:.0f}%"
        ratio = f"{result.ratio('reference'):.1f}"
        rows.add_row(op, given, f"{1e3 * result.median:.2f}", speed, share, ratio, ran, f"{result.error:.0e}")
        others = max(others, result.others or 0.0)
    show.print(rows)
    show.print("of floor: 100% is as fast as this machine can be. x PyTorch: the reference's time over ours.")
    show.print("error: against float64, checked before the timing.")
    if others > BUSY:
        show.print(f"Other programs took up to {others:.1f} cores meanwhile: run it again when they are done.")


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


def compare(first: Path, second: Path) -> None:
    """Two files that `pycircuit bench --json` wrote, row by row."""
    left, right = report.load(first), report.load(second)
    lines = comparison.lines(left, right)
    if not lines:
        raise ValueError(f"bench: {second} must hold a row that {first} has, got none")
    show = console()
    for name, found in (("first", left), ("second", right)):
        show.print(f"{name}: {found.facts['cpu']}, torch {found.facts['torch']}, {found.when}", highlight=False)
    rows = table(*comparison.HEADER)
    for line in lines:
        rows.add_row(*line)
    show.print(rows)
