"""`pycircuit train` and `pycircuit evaluate`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import torch.distributed as dist
import typer

import pycircuit as pc
from pycircuit.files.atomic import write_text
from pycircuit.files.atomic_folder import new_folder
from pycircuit.load import NAMES, available_device, language_model
from pycircuit.training import Recipe, Trainer
from pycircuit.training.presets import PRESETS, Preset
from pycircuit.training.recipe import CHOICES, SAYS

from . import texts
from .bundles import Bundle, option
from .console import console, emit
from .options import AsJson, Opening, Quiet, Running, Stopped, Texts, among, new_file
from .tracing import MaxFeatures

CURVES, RECORD = "training.svg", "training.json"  # beside the weights

PresetName = Annotated[
    str | None,
    typer.Option("--preset", help=" | ".join(PRESETS) + ": recipe, model and texts.", autocompletion=among(*PRESETS)),
]
Context = Annotated[int, typer.Option(help="Longest piece of a text, in tokens.")]


def _recipe_options() -> Bundle:
    """One option a field of the recipe; None where it is not given."""
    hints = get_type_hints(Recipe)

    def made(f: Field[Any]) -> Any:
        shown = None if f.default in (MISSING, None) else str(f.default)
        words = f.metadata[SAYS].replace("None", "not given")
        says = words[0].upper() + words[1:] + "."
        known = among(*CHOICES.get(f.name, ()))
        given = typer.Option(help=says, show_default=shown or False, autocompletion=known)
        # Of each layer, perhaps: 2,8,8.
        hint = str if f.name == "k" else hints[f.name]
        return option(f.name, Annotated[hint | None, given], None)

    return Bundle([made(f) for f in fields(Recipe)])


def train(
    model: Annotated[
        str | None,
        typer.Argument(
            help="demo, smollm2, a folder, or a hub name.", autocompletion=among(*NAMES), show_default="the preset's"
        ),
    ] = None,
    text_files: Texts = None,
    out: Annotated[Path | None, typer.Option(help="A new folder, which gets the transcoders.")] = None,
    preset: PresetName = None,
    *,
    recipe: Annotated[dict[str, Any], _recipe_options()],
    running: Running,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A file, removed at the end.", show_default="OUT.checkpoint")
    ] = None,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 100,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Transcoders for a model, from texts. Stopped on the way, the same command goes on where it was."""
    known = _preset(preset)
    followed = _recipe(known, {name: value for name, value in recipe.items() if value is not None})
    if out is None:
        raise ValueError("--out must be given: the folder that gets the transcoders, got none")
    new_folder("train", out)
    name = model or (known.model if known else None)
    if name is None:
        raise ValueError("one of MODEL and --preset must be given, got neither")
    read = _texts(text_files, known, held_out=False)
    path = out.with_name(f"{out.name}.checkpoint") if checkpoint is None else checkpoint
    with running.running() as dtype, _together(running.device) as (device, first):
        hf_model, tokenizer = language_model(name, available_device(device), dtype or torch.float32)
        trainer = Trainer(hf_model, read, followed, tokenizer)
        try:
            made = trainer.run(path, every, not quiet)
        except KeyboardInterrupt:
            raise Stopped(f"the same command goes on from {path}" if path.exists() else "") from None
    if not first:
        return
    made.save(out, model=name)
    trainer.history.plot(out / CURVES)
    last = _last(trainer)
    about = {"model": name, "recipe": asdict(followed), "last": last}
    write_text("train", out / RECORD, json.dumps(about, indent=1) + "\n")
    path.unlink(missing_ok=True)
    if as_json:
        emit({"out": str(out), **about})
        return
    console().print(
        f"{out}: {made!r}; variance explained {_mean(last['variance']):.3f}, L0 {_mean(last['active']):.1f}, "
        f"dead {100 * _mean(last['dead']):.1f}%; curves in {out / CURVES}",
        markup=False, highlight=False,
    )  # fmt: skip


@contextmanager
def _together(device: str | None) -> Iterator[tuple[str | None, bool]]:
    """(where this process computes, whether it is the one that writes); under torchrun there are several."""
    if not dist.is_torchelastic_launched():
        yield device, True
        return
    on_gpus = (device or "cpu").startswith("cuda")
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else device, dist.get_rank() == 0
        dist.barrier()  # none leaves while another still listens
    finally:
        dist.destroy_process_group()


def _preset(name: str | None) -> Preset | None:
    if name is not None and name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name] if name else None


def _ks(text: str) -> int | tuple[int, ...]:
    try:
        ks = tuple(map(int, text.split(",")))
    except ValueError:
        raise ValueError(f"--k must be a whole number, or one a layer with commas between, got {text!r}") from None
    return ks[0] if len(ks) == 1 else ks


def _recipe(preset: Preset | None, given: dict[str, Any]) -> Recipe:
    """The preset's, with what is given in its place."""
    whole = {**(asdict(preset.recipe) if preset else {}), **given}
    if "k" in given:
        whole["k"] = _ks(given["k"])
    if "features" not in whole:
        raise ValueError("--features must be given where there is no --preset, got none")
    return Recipe(**whole)


def _texts(files: list[Path] | None, preset: Preset | None, held_out: bool) -> list[Any]:
    if files:
        return texts.read(files)
    if preset is None:
        raise ValueError("one of --texts and --preset must be given, got neither")
    return preset.texts(held_out)


def _last(trainer: Trainer) -> dict[str, Any]:
    """Of the last step; lists have one entry a layer."""
    h = trainer.history
    return {
        "loss": float(h.loss[-1]),
        "variance": h.variance[-1].tolist(),
        "active": h.active[-1].tolist(),
        "dead": h.dead[-1].tolist(),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def evaluate(
    opening: Opening,
    text_files: Texts = None,
    preset: PresetName = None,
    context: Context = 256,
    graphs: Annotated[int, typer.Option(help="How many of the texts are traced for their scores.", min=0)] = 0,
    max_features: MaxFeatures = None,
    *,
    running: Running,
    plot: Annotated[Path | None, typer.Option(help="The figure, as SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """What transcoders are worth on texts they were not trained on (those a preset keeps back, with --preset)."""
    read = _texts(text_files, _preset(preset), held_out=True)
    if plot is not None:
        new_file("--plot", plot, ".svg")
    with opening.opened(running) as model:
        found = pc.evaluate(model, model.transcoders, read, context=context, graphs=graphs, max_features=max_features)
    if plot is not None:
        found.plot(plot)
    if as_json:
        emit(found.as_dict())
        return
    console().print(str(found), markup=False, highlight=False, soft_wrap=True)
