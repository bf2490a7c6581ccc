"""`pycircuit train`, `pycircuit export` and `pycircuit evaluate`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, dataclass, fields
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import torch.distributed as dist
import typer

import pycircuit as pc
from pycircuit.command_interrupt import Stopped
from pycircuit.files.atomic import write_text
from pycircuit.files.atomic_folder import new_folder
from pycircuit.loading import NAMES, available_device, language_model
from pycircuit.training import HeldOutPlan, History, Recipe, Trainer
from pycircuit.training.presets import PRESETS, Preset
from pycircuit.training.recipe import CHOICES, HELP
from pycircuit.training.trainer_state import read
from pycircuit.training.watch import outlooks
from pycircuit.transcoders import Transcoders

from . import texts
from .bundles import Bundle, option
from .console import console, emit
from .options import AsJson, Opening, Quiet, Running, Texts, check_new_file, completions
from .tracing import MaxFeatures, parse_feature_count

CURVES, RECORD = "training.svg", "training.json"  # beside the weights

PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset", help=" | ".join(PRESETS) + ": recipe, model and texts.", autocompletion=completions(*PRESETS)
    ),
]
Context = Annotated[int, typer.Option(help="Longest part of a text, in tokens.")]


def _recipe_options() -> Bundle:
    """Options of the recipe, one a field; None for those left out."""
    hints = get_type_hints(Recipe)

    def recipe_option(f: Field[Any]) -> Parameter:
        default = None if f.default in (MISSING, None) else str(f.default)
        choices = CHOICES.get(f.name, ())
        description = f.metadata[HELP].replace("None", "not given") + "."
        if not description.startswith(choices or " "):  # choices are shown as they are written
            description = description[0].upper() + description[1:]
        settings = typer.Option(help=description, show_default=default or False, autocompletion=completions(*choices))
        hint = str if choices or f.name == "k" else hints[f.name]  # k may be one number a layer: 2,8,8
        return option(f.name, Annotated[hint | None, settings], None)

    return Bundle([recipe_option(f) for f in fields(Recipe)])


@dataclass(frozen=True)
class Watching:
    """Options of checkpoints and of evaluation while a run goes on."""

    checkpoint: Annotated[
        Path | None, typer.Option(help="A file, removed at the end.", show_default="OUT.checkpoint")
    ] = None
    every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 100
    minutes: Annotated[float, typer.Option(help="Minutes between checkpoints, if that is sooner.")] = 5.0
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Files of texts to evaluate on meanwhile, as --texts.", show_default="the preset's"),
    ] = None
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations.", min=1, show_default="a tenth of the run")
    ] = None
    patience: Annotated[
        int | None,
        typer.Option(help="Evaluations without a rise of 0.001 after which the run stops.", min=1),
    ] = None

    def plan(self, preset: Preset | None) -> HeldOutPlan | None:
        """Held-out text of the files or of the preset; None without either."""
        if self.held_out or preset is not None:
            return HeldOutPlan(_texts(self.held_out, preset, held_out=True), self.evaluate_every, self.patience)
        if self.patience is not None or self.evaluate_every is not None:
            name = "--evaluate-every" if self.patience is None else "--patience"
            raise ValueError(f"--held-out must be given for {name} where there is no --preset, got none")
        return None


def train(
    model: Annotated[
        str | None,
        typer.Argument(
            help="demo, smollm2, a folder, or a hub name.",
            autocompletion=completions(*NAMES),
            show_default="the preset's",
        ),
    ] = None,
    text_files: Texts = None,
    out: Annotated[Path | None, typer.Option(help="A new folder, which gets the transcoders.")] = None,
    preset: PresetName = None,
    *,
    recipe: Annotated[dict[str, Any], _recipe_options()],
    running: Running,
    watching: Watching,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train transcoders for a model on texts. After a stop, the same command continues, with other --steps too."""
    chosen_preset = _preset(preset)
    options = _recipe(chosen_preset, {name: value for name, value in recipe.items() if value is not None})
    if out is None:
        raise ValueError("--out must be given: the folder that gets the transcoders, got none")
    new_folder("train", out)
    name = model or (chosen_preset.model if chosen_preset else None)
    if name is None:
        raise ValueError("one of MODEL and --preset must be given, got neither")
    training_texts = _texts(text_files, chosen_preset, held_out=False)
    plan = watching.plan(chosen_preset)
    path = watching.checkpoint or out.with_name(f"{out.name}.checkpoint")
    with running.running() as dtype, _distributed(running.device) as (device, writes):
        hf_model, tokenizer = language_model(name, available_device(device), dtype or torch.float32)
        trainer = Trainer(hf_model, training_texts, options, tokenizer)
        try:
            transcoders = trainer.run(path, watching.every, not quiet, minutes=watching.minutes, held_out=plan)
        except KeyboardInterrupt:
            raise Stopped(f"the same command goes on from {path}" if path.exists() else "") from None
    if not writes:
        return
    record = write_set(out, transcoders, name, options, trainer.history)
    path.unlink(missing_ok=True)
    if as_json:
        emit({"out": str(out), **record})
    else:
        _print(out, transcoders, record)
        for sentence in outlooks(trainer):
            console().print(sentence, markup=False, highlight=False, soft_wrap=True)


def write_set(
    out: Path, transcoders: Transcoders, model: str | None, recipe: Recipe, history: History
) -> dict[str, Any]:
    """Write transcoders, their curves and the record of their training into a new folder; return the record."""
    transcoders.save(out, model=model)
    history.plot(out / CURVES)
    curve = history.held_out
    held_out = {
        "steps": curve.steps.tolist(),
        "agreement": curve.agreement.tolist(),
        "variance": curve.variance.tolist(),
    }
    record = {"model": model, "recipe": asdict(recipe), "last": _last_step(history), "held_out": held_out}
    write_text("train", out / RECORD, json.dumps(record, indent=1) + "\n")
    return record


def _print(out: Path, transcoders: Transcoders, record: dict[str, Any]) -> None:
    last_step = record["last"]
    mean = {name: sum(last_step[name]) / len(last_step[name]) for name in ("variance", "active", "dead")}
    console().print(
        f"{out}: {transcoders!r}; variance explained {mean['variance']:.3f}, L0 {mean['active']:.1f}, "
        f"dead {100 * mean['dead']:.1f}%; curves in {out / CURVES}",
        markup=False,
        highlight=False,
    )


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A file that train writes while it runs.")],
    out: Annotated[Path, typer.Argument(help="A new folder, which gets the transcoders.")],
    model: Annotated[str | None, typer.Option(help="Name of the model, for the folder's record.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the transcoders of a checkpoint of train as they are; the run can go on, or be going on."""
    new_folder("export", out)
    saved = read("export", checkpoint, "cpu")
    transcoders = saved.transcoders()
    record = write_set(out, transcoders, model, saved.recipe, saved.history)
    if as_json:
        emit({"out": str(out), "steps": saved.steps, **record})
    else:
        _print(out, transcoders, record)


@contextmanager
def _distributed(device: str | None) -> Iterator[tuple[str | None, bool]]:
    """(device of this process, True if it writes the files); under torchrun there are several processes."""
    if not dist.is_torchelastic_launched():
        yield device, True
        return
    on_gpus = (device or "cpu").startswith("cuda")
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else device, dist.get_rank() == 0
        dist.barrier()  # no process leaves before the others are done
    finally:
        dist.destroy_process_group()


def _preset(name: str | None) -> Preset | None:
    if name is not None and name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name] if name else None


def _parse_k(text: str) -> int | tuple[int, ...]:
    try:
        counts = tuple(map(int, text.split(",")))
    except ValueError:
        raise ValueError(f"--k must be a whole number, or one a layer with commas between, got {text!r}") from None
    return counts[0] if len(counts) == 1 else counts


def _recipe(preset: Preset | None, options: dict[str, Any]) -> Recipe:
    """The preset's recipe, changed by the options."""
    values = {**(asdict(preset.recipe) if preset else {}), **options}
    if "k" in options:
        values["k"] = _parse_k(options["k"])
    if "features" not in values:
        raise ValueError("--features must be given where there is no --preset, got none")
    return Recipe(**values)


def _texts(files: list[Path] | None, preset: Preset | None, held_out: bool) -> Sequence[texts.Text]:
    if files:
        return texts.read(files)
    if preset is None:
        raise ValueError("one of --texts and --preset must be given, got neither")
    return preset.texts(held_out)


def _last_step(history: History) -> dict[str, Any]:
    """Measurements of the last step; lists have one entry a layer."""
    return {
        "loss": float(history.loss[-1]),
        "variance": history.variance[-1].tolist(),
        "active": history.active[-1].tolist(),
        "dead": history.dead[-1].tolist(),
    }


def evaluate(
    opening: Opening,
    text_files: Texts = None,
    preset: PresetName = None,
    context: Context = 256,
    graphs: Annotated[int, typer.Option(help="Number of texts that are traced for their scores.", min=0)] = 0,
    max_features: MaxFeatures = None,
    *,
    running: Running,
    plot: Annotated[Path | None, typer.Option(help="The figure, as SVG.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate transcoders on texts they were not trained on (with --preset, those it holds out)."""
    held_out_texts = _texts(text_files, _preset(preset), held_out=True)
    if plot is not None:
        check_new_file("--plot", plot, ".svg")
    with opening.opened(running) as model:
        evaluation = pc.evaluate(
            model,
            model.transcoders,
            held_out_texts,
            context=context,
            graphs=graphs,
            max_features=parse_feature_count(max_features),
            progress=not quiet,
        )
    if plot is not None:
        evaluation.plot(plot)
    if as_json:
        emit(evaluation.as_dict())
        return
    console().print(str(evaluation), markup=False, highlight=False, soft_wrap=True)
