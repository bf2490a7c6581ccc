"""`pycircuit inspect` and `pycircuit convert`: transcoders on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pycircuit.demo.demo_model import KINDS
from pycircuit.demo.facts import DATA
from pycircuit.transcoders import io
from pycircuit.transcoders.formats.saving import LAYOUTS
from pycircuit.transcoders.types import READS, WRITES

from .console import console, emit
from .options import DTYPES, AsJson, completions


@dataclass(frozen=True)
class Reading:
    """Facts about the transcoders that their files do not say."""

    layers: Annotated[int | None, typer.Option(help="The model's, where some may have no transcoder.", min=1)] = None
    variant: Annotated[
        str | None, typer.Option(help="Which of several sets: parts of a path, or 'not' one, with commas.")
    ] = None
    reads: Annotated[str | None, typer.Option(help=" | ".join(READS), autocompletion=completions(*READS))] = None
    writes: Annotated[str | None, typer.Option(help=" | ".join(WRITES), autocompletion=completions(*WRITES))] = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of io.inspect and io.convert."""
        return {"layers": self.layers, "variant": self.variant, "reads": self.reads, "writes": self.writes}


def _source(path: str, reading: Reading) -> tuple[str, dict[str, Any]]:
    """(folder or hub id, arguments of io.inspect); demo's two sets are chosen by --variant."""
    arguments = reading.arguments()
    if path != "demo":
        return path, arguments
    kind = reading.variant or KINDS[0]
    if kind not in KINDS:
        raise ValueError(f"--variant must be one of {', '.join(KINDS)} for demo, got {kind!r}")
    return str(DATA / kind), {**arguments, "variant": None}


def inspect(
    path: Annotated[
        str, typer.Argument(help="A folder or a hub name; demo is the demo model's, --variant clt or plt.")
    ],
    *,
    reading: Reading,
    headers: Annotated[bool, typer.Option("--headers", help="Read headers alone, look for no damage.")] = False,
    as_json: AsJson = False,
) -> None:
    """Describe a set of transcoders as it would be loaded, and warn of damage."""
    folder, arguments = _source(path, reading)
    report = io.inspect(folder, weights=not headers, **arguments)
    if as_json:
        emit(report.json())
        return
    console().print(str(report), markup=False, highlight=False, soft_wrap=True)


def convert(
    source: Annotated[str, typer.Argument(help="A folder or a hub name, of any format; or demo, as in inspect.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[str, typer.Option(help=" | ".join(LAYOUTS), autocompletion=completions(*LAYOUTS))] = "circuit-tracer",
    dtype: Annotated[
        str | None,
        typer.Option(help=" | ".join(DTYPES), show_default="as stored", autocompletion=completions(*DTYPES)),
    ] = None,
    *,
    reading: Reading,
    as_json: AsJson = False,
) -> None:
    """Convert transcoders of any format into a new folder. After a stop, the same command continues."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    stored_type = None if dtype is None else getattr(torch, dtype)
    path, arguments = _source(source, reading)
    folder = io.convert(path, target, to, dtype=stored_type, **arguments)
    if as_json:
        emit({"source": source, "target": str(folder), "to": to})
        return
    console().print(f"{source} -> {folder}, {to}", markup=False, highlight=False)
