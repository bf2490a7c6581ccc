"""`pycircuit benchmark-truth`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import pycircuit as pc
from pycircuit.command_interrupt import Stopped
from pycircuit.demo.demo_model import KINDS

from .console import emit
from .options import AsJson, Quiet, Running, check_new_file, completions


def benchmark_truth(
    model: Annotated[str, typer.Argument(help="demo | smollm2", autocompletion=completions("demo", "smollm2"))],
    out: Annotated[Path, typer.Option(help="The figures, as JSON.")],
    transcoders: Annotated[
        list[str] | None,
        typer.Option("--transcoders", "-t", help="A folder or a hub name, or several; demo has clt and plt."),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of each of ten behaviours.", min=1)] = 10,
    rows: Annotated[int, typer.Option(help="Features of a graph that get a row.", min=1)] = 2048,
    neuron_rows: Annotated[int, typer.Option(help="Neurons that do; 0 leaves neurons out.", min=0)] = 512,
    sources: Annotated[int, typer.Option(help="Features, and supernodes, changed on a prompt.", min=1)] = 12,
    *,
    running: Running,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure how well graphs foretell what a model does. After a stop, the same command continues."""
    from pycircuit.truth import TruthRun, behaviours, section

    check_new_file("--out", out, ".json")
    groups = behaviours(model)
    names = transcoders or (list(KINDS) if model == "demo" else [])
    if not names:
        raise ValueError("--transcoders must be given for smollm2, got none; pycircuit train makes some")
    with running.running() as dtype:
        sets = {Path(name).name: pc.load(model, name, device=running.device, dtype=dtype) for name in names}
        run = TruthRun(model, sets, groups, out, prompts, rows, neuron_rows, sources)
        try:
            document = run.run(not quiet)
        except KeyboardInterrupt:
            raise Stopped(f"the same command goes on from {run.partial}" if run.partial.exists() else "") from None
    if as_json:
        emit(document)
    else:
        sys.stdout.write(section(document))
