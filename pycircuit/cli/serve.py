"""`pycircuit serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

import pycircuit as pc
from pycircuit.loading import NAMES
from pycircuit.transcoders.formats.hooks import ReadSite, WriteSite

from .console import console
from .options import Running, completions


def serve(
    source: Annotated[
        str,
        typer.Argument(help="A folder of graphs, or a model as of attribute.", autocompletion=completions(*NAMES)),
    ],
    transcoders: Annotated[
        str | None, typer.Option("--transcoders", "-t", help="A folder or a hub name, of a model.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Which of several sets, as of attribute.")] = None,
    reads: Annotated[str | None, typer.Option(help="Where transcoders read, if files do not say: a hook.")] = None,
    writes: Annotated[str | None, typer.Option(help="Where they write.")] = None,
    cache: Annotated[str | None, typer.Option(help="Bytes of decoder rows kept, such as 4GiB.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where a model's graphs are, and go.", show_default="graphs")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(help="A folder that pycircuit examples wrote, for the features' cards.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address that listens; others than this machine's ask for --token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(help="Of the address.", show_default="8765, or the next free")] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="PYCIRCUIT_TOKEN", help="A secret of 16 characters or more that the address must carry."),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page.")] = False,
    *,
    running: Running,
) -> None:
    """Open graphs in a browser: look, group, edit, compare, intervene and trace on this machine."""
    options = {"variant": variant, "reads": reads, "writes": writes, "cache": cache}
    is_folder = Path(source).is_dir() and transcoders is None
    with running.running() as dtype:
        model: str | pc.ReplacementModel = source
        if not is_folder:
            model = pc.load(
                source, transcoders, device=running.device, dtype=dtype, variant=variant,
                reads=cast(ReadSite | None, reads), writes=cast(WriteSite | None, writes), cache=cache,
            )  # fmt: skip
        elif wrong := next((name for name, value in options.items() if value is not None), None):
            raise ValueError(f"--{wrong} must go with a model, got the folder {source}")
        page = pc.serve(
            model,
            folder=folder,
            examples=examples,
            name=None if is_folder else source,
            host=host,
            port=port,
            token=token,
            browser=browser,
        )
        console().print(f"{page.address}  (Ctrl-C ends it)", markup=False, highlight=False, soft_wrap=True)
        page.wait()
