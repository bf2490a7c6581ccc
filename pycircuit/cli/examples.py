"""`pycircuit examples`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import pycircuit as pc

from . import texts
from .console import console, emit
from .options import AsJson, Opening, Prompts, Quiet, Running, Texts
from .train import Context

SERVED = "./data/features/"  # where circuit-tracer's page finds a folder of files; other names it asks the hub for


def examples(
    opening: Opening,
    text_files: Texts = None,
    prompts: Prompts = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the graphs' JSON.")] = None,
    scan: Annotated[str, typer.Option(help="The set of transcoders, which names the new folder.")] = "local",
    graphs: Annotated[
        list[Path] | None,
        typer.Option("--graph", help="A saved graph, or several: features of theirs alone.", show_default="all"),
    ] = None,
    top: Annotated[int, typer.Option(help="Texts a feature is most active on.", min=0)] = 20,
    groups: Annotated[int, typer.Option(help="Quantiles shown beside them.", min=0)] = 4,
    per_group: Annotated[int, typer.Option(help="Tokens of each quantile.", min=0)] = 5,
    around: Annotated[int, typer.Option(help="Tokens shown on either side.", min=0)] = 24,
    logits: Annotated[int, typer.Option(help="Tokens raised and lowered most.", min=0)] = 10,
    context: Context = 256,
    *,
    running: Running,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Where each feature is active, one file a feature, as pages of graphs show it."""
    if out is None:
        raise ValueError("--out must be given: the folder of the graphs' JSON, got none")
    read = _texts(opening.model, text_files, prompts)
    features = _features(graphs or [])
    with opening.opened(running) as model:
        made = pc.write_examples(
            model, read, out, scan, features=features, top=top, groups=groups, per_group=per_group, around=around,
            logits=logits, context=context, progress=not quiet,
        )  # fmt: skip
    files = sum(1 for _ in made.iterdir())
    if as_json:
        emit({"out": str(made), "features": files, "scan": f"{SERVED}{scan}"})
        return
    console().print(
        f"{made}: {files} features; `pycircuit attribute ... --to-json {out}/NAME.json --scan {SERVED}{scan}` "
        "makes a graph that shows them",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _texts(model: str, files: list[Path] | None, prompts: Path | None) -> list[Any]:
    """Those that were given; the statements that the demo model was taught, where none were."""
    if files and prompts:
        raise ValueError("one of --texts and --prompts must be given, got both")
    if files:
        return texts.read(files)
    if prompts is not None:
        return texts.read([prompts], by_line=True)
    if model != "demo":
        raise ValueError("one of --texts and --prompts must be given, got neither")
    from pycircuit.demo.facts import facts

    return [statement.prompt for statement in facts().statements()]


def _features(graphs: list[Path]) -> list[tuple[int, int]] | None:
    if not graphs:
        return None
    return sorted({(layer, f) for path in graphs for layer, _, f in pc.Graph.load(path).features.tolist()})
