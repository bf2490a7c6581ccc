"""Options that several commands share, and parsers of their values."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import typer

import pycircuit as pc
from pycircuit.loading import NAMES
from pycircuit.ops.registry import IMPLEMENTATIONS
from pycircuit.ops.threads import check_threads
from pycircuit.transcoders.formats.hooks import ReadSite, WriteSite

from . import texts

DTYPES = ("float32", "float64", "bfloat16", "float16")
_FEATURE = re.compile(r"(\d+)/(-?\d+)/(\d+)")


def completions(*names: str) -> Callable[[str], list[str]]:
    """Return a shell completion that offers these names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Prompt = Annotated[str | None, typer.Argument(help="Text; - reads it from standard input.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="A file of prompts, numbered by line from 1: .txt has one a line (--texts reads a .txt as one text), "
        ".jsonl one a line, .npy and .safetensors token ids, one a row.",
    ),
]
Ids = Annotated[bool, typer.Option("--ids", help="The prompt is token ids, as in 5,17,42.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--texts",
        help="A file, or several: .txt is one text (--prompts reads one a line), .jsonl has one a line, .npy and "
        ".safetensors hold token ids.",
    ),
]


@dataclass(frozen=True)
class Running:
    """Device, type, threads and implementation of a command."""

    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="cpu")] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help=" | ".join(DTYPES) + ", of the model's weights.",
            show_default="float32",
            autocompletion=completions(*DTYPES),
        ),
    ] = None
    threads: Annotated[int | None, typer.Option(help="Of the processor, at the most.", min=1)] = None
    implementation: Annotated[
        str | None,
        typer.Option(
            help=" | ".join(IMPLEMENTATIONS) + ", forced; see pycircuit doctor.",
            autocompletion=completions(*IMPLEMENTATIONS),
        ),
    ] = None

    @contextmanager
    def running(self) -> Iterator[torch.dtype | None]:
        """Set threads and implementation while open, and give the type of the model's weights."""
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.threads is not None:
            check_threads("pycircuit", "--threads", self.threads)
        _silence_transformers()
        before = torch.get_num_threads()
        with pc.use(self.implementation):
            torch.set_num_threads(self.threads or before)
            try:
                yield None if self.dtype is None else getattr(torch, self.dtype)
            finally:
                torch.set_num_threads(before)


def _silence_transformers() -> None:
    """Switch off progress bars and advice of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@dataclass(frozen=True)
class Opening:
    """The model a command works on, and its transcoders."""

    model: Annotated[
        str,
        typer.Argument(
            help="demo, smollm2, a folder, or a name on the Hugging Face hub.", autocompletion=completions(*NAMES)
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
        """Load the model, with threads and implementation set while it is open."""
        with running.running() as dtype:
            yield pc.load(
                self.model,
                self.transcoders,
                device=running.device,
                dtype=dtype,
                variant=self.variant,
                reads=cast(ReadSite | None, self.reads),
                writes=cast(WriteSite | None, self.writes),
                cache=self.cache,
            )


def parse_target(text: str) -> int | pc.Feature | str:
    """Parse a target: id:8941 is a token's id, 3/5/412 a feature, anything else the text of a token."""
    feature = _FEATURE.fullmatch(text)
    if feature is not None:
        layer, position, index = (int(number) for number in feature.groups())
        return pc.Feature(layer, position, index)
    if not text.startswith("id:"):
        return text
    number = text.removeprefix("id:")
    if not number.isdecimal():
        raise ValueError(f"--target must be id: and a number from 0, as in id:8941, got {text!r}")
    return int(number)


def parse_targets(texts: list[str], against: list[str]) -> list[int | str | pc.Feature | pc.Contrast] | None:
    """Parse the targets of a trace; None for the likeliest. against: makes them one side of one contrast."""
    if not against:
        return [parse_target(text) for text in texts] or None
    if not texts:
        raise ValueError("--against must go with the tokens of --target, got none")
    sides = [[parse_target(text) for text in side] for side in (texts, against)]
    features = [text for text in texts + against if _FEATURE.fullmatch(text)]
    if features:
        raise ValueError(f"--target and --against must be tokens, got the feature {features[0]}")
    return [pc.Contrast(*cast(list[list[int | str]], sides))]


@dataclass(frozen=True)
class PromptList:
    """Prompts of a command: PROMPT alone, or those of the file of --prompts with their line numbers."""

    texts: list[texts.Text]
    numbers: list[int]
    path: Path | None = None

    @classmethod
    def of(cls, prompt: str | None, path: Path | None, ids: bool = False) -> PromptList:
        """Read PROMPT or --prompts. ids: strings are token ids."""
        if prompt is not None and path is None:
            text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
            if not text.strip():
                raise ValueError(f"PROMPT must have at least one token, got {text!r}")
            lines = [texts.NumberedText(1, text)]
        elif path is not None and prompt is None:
            lines = texts.read_lines(path)
        else:
            got = "neither" if prompt is None else "both"
            raise ValueError(f"one of PROMPT and --prompts must be given, got {got}")
        prompts = [texts.token_ids(line.text) if ids and isinstance(line.text, str) else line.text for line in lines]
        return cls(prompts, [line.number for line in lines], path)

    @property
    def from_file(self) -> bool:
        """True for --prompts, whose results are lists."""
        return self.path is not None

    def check(self, model: pc.ReplacementModel) -> None:
        """Refuse a prompt of a file that the model cannot take, with its line number."""
        if self.path is None:
            return
        for number, text in zip(self.numbers, self.texts, strict=True):
            try:
                model.tokens(text)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{self.path}, line {number}: {error}") from None


def check_new_file(option: str, path: Path, ending: str) -> None:
    """Refuse a path where no file can be written, before anything is computed."""
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got the folder {path}")
    if path.suffix != ending:
        raise ValueError(f"{option} must end in {ending}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} must be in a folder that exists, got {path}")
    _check_writable(option, path.parent)


def _check_writable(option: str, folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{option} must be in a folder that can be written to, got {folder}")


def check_output_folder(option: str, path: Path) -> None:
    """Refuse a path that is no folder to write numbered files in."""
    if not path.is_dir():
        raise ValueError(f"{option} must be a folder that exists with --prompts, got {path}")
    _check_writable(option, path)


def parse_layers(text: str | None) -> range | None:
    """Parse layers written as 3-7, both ends included, or as one layer."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ValueError(f"--layers must be the first and the last layer, as in 3-7, got {text!r}")
    return range(int(match[1]), int(match[2] or match[1]) + 1)
