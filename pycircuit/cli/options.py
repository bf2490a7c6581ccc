"""Options that several commands have, and how what is written in them is read."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import pycircuit as pc
from pycircuit.load import NAMES
from pycircuit.ops.registry import IMPLEMENTATIONS
from pycircuit.ops.threads import check_threads

from . import texts

DTYPES = ("float32", "float64", "bfloat16", "float16")
_FEATURE = re.compile(r"(\d+)/(-?\d+)/(\d+)")


def among(*known: str) -> Callable[[str], list[str]]:
    """For a shell's completion."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete


class Stopped(Exception):
    """Ctrl-C, and what is left of the work."""


AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Prompt = Annotated[str | None, typer.Argument(help="Text; - reads it from standard input.")]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="Many: .txt with one a line, .jsonl, or token ids in .npy.")
]
Ids = Annotated[bool, typer.Option("--ids", help="The prompt is token ids, as in 5,17,42.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--texts", help="A file, or several: .txt is one text, .jsonl one a line, .npy and .safetensors ids."),
]


@dataclass(frozen=True)
class Running:
    """Where a command computes, and with what."""

    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="cpu")] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help=" | ".join(DTYPES) + ", of the model's weights.", show_default="float32", autocompletion=among(*DTYPES)
        ),
    ] = None
    threads: Annotated[int | None, typer.Option(help="Of the processor, at the most.", min=1)] = None
    implementation: Annotated[
        str | None,
        typer.Option(
            help=" | ".join(IMPLEMENTATIONS) + ", forced; see pycircuit doctor.", autocompletion=among(*IMPLEMENTATIONS)
        ),
    ] = None

    @contextmanager
    def running(self) -> Iterator[torch.dtype | None]:
        """Threads and implementation as they were asked for; the type of the model's weights."""
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.threads is not None:
            check_threads("pycircuit", "--threads", self.threads)
        _silence()
        before = torch.get_num_threads()
        with pc.use(self.implementation):
            torch.set_num_threads(self.threads or before)
            try:
                yield None if self.dtype is None else getattr(torch, self.dtype)
            finally:
                torch.set_num_threads(before)


def _silence() -> None:
    """Bars and advice of transformers say nothing about what was asked for."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@dataclass(frozen=True)
class Opening:
    """Which model a command works on."""

    model: Annotated[
        str,
        typer.Argument(
            help="demo, smollm2, a folder, or a name on the Hugging Face hub.", autocompletion=among(*NAMES)
        ),
    ]
    transcoders: Annotated[
        str | None, typer.Option("--transcoders", "-t", help="A folder or a hub name; demo has its own, clt and plt.")
    ] = None
    variant: Annotated[
        str | None, typer.Option(help="Which of several sets: parts of a path, or 'not' one, with commas.")
    ] = None
    reads: Annotated[str | None, typer.Option(help="Where transcoders read, if files do not say: a hook.")] = None
    writes: Annotated[str | None, typer.Option(help="Where they write.")] = None
    cache: Annotated[str | None, typer.Option(help="Bytes of decoder rows kept, such as 4GiB.")] = None

    @contextmanager
    def opened(self, running: Running) -> Iterator[pc.ReplacementModel]:
        told = {"variant": self.variant, "reads": self.reads, "writes": self.writes, "cache": self.cache}
        with running.running() as dtype:
            yield pc.load(self.model, self.transcoders, device=running.device, dtype=dtype, **told)


def target(given: str) -> Any:
    """`id:8941` is a token's id, 3/5/412 a feature, anything else the text of a token."""
    feature = _FEATURE.fullmatch(given)
    if feature is not None:
        return pc.Feature(*(int(number) for number in feature.groups()))
    number = given.removeprefix("id:")
    return int(number) if number != given and number.isdigit() else given


def prompts_of(prompt: str | None, many: Path | None, ids: bool) -> list[Any]:
    """The one prompt, or those of a file: texts or lists of token ids."""
    if (prompt is None) == (many is None):
        raise ValueError("one of PROMPT and --prompts must be given, got " + ("neither" if prompt is None else "both"))
    if prompt is None:
        assert many is not None
        found = texts.read([many], by_line=True)
    else:
        found = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt]
        if not found[0].strip():
            raise ValueError(f"PROMPT must have at least one token, got {found[0]!r}")
    return [texts.token_ids(text) if ids and isinstance(text, str) else text for text in found]


def new_file(option: str, path: Path, ending: str) -> None:
    """That a file can be written there, before anything is computed."""
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got the folder {path}")
    if path.suffix != ending:
        raise ValueError(f"{option} must end in {ending}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} must be in a folder that exists, got {path}")
    _writable(option, path.parent)


def _writable(option: str, folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{option} must be in a folder that can be written to, got {folder}")


def folder_of_files(option: str, path: Path) -> None:
    """The same of many files, which get names of their own there."""
    if not path.is_dir():
        raise ValueError(f"{option} must be a folder that exists with --prompts, got {path}")
    _writable(option, path)


def layers_of(given: str | None) -> range | None:
    """3-7, both ends included, or one layer."""
    if given is None:
        return None
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", given)
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise ValueError(f"--layers must be the first and the last layer, as in 3-7, got {given!r}")
    return range(int(found[1]), int(found[2] or found[1]) + 1)
