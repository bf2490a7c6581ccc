"""`pycircuit demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pycircuit.bench import machine_rates

from .console import console, emit
from .options import AsJson, check_new_file


def demo(
    city: Annotated[str, typer.Option(help="The city of the question.")] = "Dallas",
    other: Annotated[str, typer.Option(help="The city whose state replaces that city's state.")] = "Oakland",
    svg: Annotated[Path | None, typer.Option("--plot", help="The picture of the circuit, as SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Trace a two-hop question in the demo model, then swap its state's features for another state's."""
    from pycircuit.demo.demonstration import run

    if svg is not None:
        check_new_file("--plot", svg, ".svg")
    with machine_rates.threads_set(1):  # its tensors are tiny: more threads wait for each other
        result = run(console(stderr=as_json), city, other, svg)
    if as_json:
        emit(result)
