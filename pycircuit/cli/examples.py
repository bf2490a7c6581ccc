"""`pycircuit examples`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import pycircuit as pc

from . import texts
from .console import console, emit
from .options import AsJson, Opening, PromptList, Prompts, Quiet, Running, Texts
from .train import Context

PAGE_FOLDER = "./data/features/"  # where circuit-tracer's page finds a folder of files; other names are of the hub


def examples(
    opening: Opening,
    text_files: Texts = None,
    prompts: Prompts = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the graphs' JSON.")] = None,
    scan: Annotated[str, typer.Option(help="The set of transcoders, which names the new folder.")] = "local",
    graphs: Annotated[
        list[Path] | None,
        typer.Option("--graph", help="A saved graph, or several: only their features.", show_default="all"),
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
    """Write the texts where each feature is active, one file a feature, for the page of graphs."""
    if out is None:
        raise ValueError("--out must be given: the folder of the graphs' JSON, got none")
    if text_files and prompts:
        raise ValueError("one of --texts and --prompts must be given, got both")
    prompt_list = None if prompts is None else PromptList.of(None, prompts)
    corpus = _texts(opening.model, text_files) if prompt_list is None else prompt_list.texts
    features = _features(graphs or [])
    with opening.opened(running) as model:
        if prompt_list is not None:
            prompt_list.check(model)
        folder = pc.write_examples(
            model,
            corpus,
            out,
            scan,
            features=features,
            top=top,
            groups=groups,
            per_group=per_group,
            around=around,
            logits=logits,
            context=context,
            progress=not quiet,
        )
    files = sum(1 for _ in folder.iterdir())
    if as_json:
        emit({"out": str(folder), "features": files, "scan": f"{PAGE_FOLDER}{scan}"})
        return
    console().print(
        f"{folder}: {files} features; `pycircuit attribute ... --to-json {out}/NAME.json --scan {PAGE_FOLDER}{scan}` "
        "makes a graph that shows them",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _texts(model: str, files: list[Path] | None) -> Sequence[texts.Text]:
    """Texts of the files; without files, the statements that the demo model was trained on."""
    if files:
        return texts.read(files)
    if model != "demo":
        raise ValueError("one of --texts and --prompts must be given, got neither")
    from pycircuit.demo.facts import facts

    return [statement.prompt for statement in facts().statements()]


def _features(graphs: list[Path]) -> list[tuple[int, int]] | None:
    """(layer, feature) pairs in saved graphs; None, for all, without graphs."""
    if not graphs:
        return None
    return sorted({(layer, f) for path in graphs for layer, _, f in pc.Graph.load(path).features.tolist()})
