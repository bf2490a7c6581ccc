"""`pycircuit inspect` and `pycircuit convert`: transcoders on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pycircuit.transcoders import io
from pycircuit.transcoders.formats.saving import LAYOUTS
from pycircuit.transcoders.types import READS, WRITES

from .console import console, emit
from .options import DTYPES, AsJson, among


@dataclass(frozen=True)
class Reading:
    """What the files leave open."""

    layers: Annotated[int | None, typer.Option(help="The model's, where some may have no transcoder.", min=1)] = None
    variant: Annotated[
        str | None, typer.Option(help="Which of several sets: parts of a path, or 'not' one, with commas.")
    ] = None
    reads: Annotated[str | None, typer.Option(help=" | ".join(READS), autocompletion=among(*READS))] = None
    writes: Annotated[str | None, typer.Option(help=" | ".join(WRITES), autocompletion=among(*WRITES))] = None

    def arguments(self) -> dict[str, Any]:
        return {"layers": self.layers, "variant": self.variant, "reads": self.reads, "writes": self.writes}


def inspect(
    path: Annotated[str, typer.Argument(help="A folder or a hub name.")],
    *,
    reading: Reading,
    headers: Annotated[bool, typer.Option("--headers", help="Read headers alone, look for no damage.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a set of transcoders is, as it would be loaded, and what is wrong with it."""
    found = io.inspect(path, weights=not headers, **reading.arguments())
    if as_json:
        emit(found.json())
        return
    console().print(str(found), markup=False, highlight=False, soft_wrap=True)


def convert(
    source: Annotated[str, typer.Argument(help="A folder or a hub name, of any format.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[str, typer.Option(help=" | ".join(LAYOUTS), autocompletion=among(*LAYOUTS))] = "circuit-tracer",
    dtype: Annotated[
        str | None,
        typer.Option(help=" | ".join(DTYPES), show_default="as stored", autocompletion=among(*DTYPES)),
    ] = None,
    *,
    reading: Reading,
    as_json: AsJson = False,
) -> None:
    """Transcoders of any format into a new folder; stopped on the way, the same command goes on."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kept = None if dtype is None else getattr(torch, dtype)
    written = io.convert(source, target, to, dtype=kept, **reading.arguments())
    if as_json:
        emit({"source": source, "target": str(written), "to": to})
        return
    console().print(f"{source} -> {written}, {to}", markup=False, highlight=False)
