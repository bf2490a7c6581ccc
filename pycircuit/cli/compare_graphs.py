"""`pycircuit compare`: two graphs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

import pycircuit as pc
from pycircuit.graph.comparison import ALIGNMENTS, Alignment

from .console import console, emit, table
from .options import AsJson, completions


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A graph: .safetensors, or circuit-tracer's .pt.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The graph that it is compared with.")],
    align: Annotated[
        str,
        typer.Option(
            help=" | ".join(ALIGNMENTS) + ": features at one position, at all together, or by label (two models).",
            autocompletion=completions(*ALIGNMENTS),
        ),
    ] = "position",
    node_threshold: Annotated[float, typer.Option(help="Share of the influence in the nodes compared.")] = 0.8,
    edge_threshold: Annotated[float, typer.Option(help="Share of the influence in the edges compared.")] = 0.98,
    limit: Annotated[int, typer.Option(help="Lines of each table.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """Compare two graphs: nodes and edges of one alone, and of both with their change."""
    first, second = (_load(path) for path in (a, b))
    compared = pc.compare(
        first, second, align=cast(Alignment, align), node_threshold=node_threshold, edge_threshold=edge_threshold
    )
    if as_json:
        emit(compared.as_dict())
        return
    terminal = console()
    terminal.print(f"A {a}, B {b}: similarity {compared.similarity:.3f}", highlight=False)
    for title, (header, *rows) in compared.tables().items():
        if not rows:
            continue
        more = f", {limit} of them" if len(rows) > limit else ""
        terminal.print(f"\n[bold]{title}[/bold]: {len(rows)}{more}", highlight=False)
        lines = table(*header)
        for row in rows[:limit]:
            lines.add_row(*(text.replace("[", r"\[") for text in row))
        terminal.print(lines)


def _load(path: Path) -> pc.Graph:
    return pc.Graph.from_circuit_tracer(path) if path.suffix == ".pt" else pc.Graph.load(path)
