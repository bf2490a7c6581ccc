"""Checkpoint of a run in one file: weights, Adam's moments and measurements; the seed gives the buffers again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pycircuit.files.atomic import replace_file
from pycircuit.files.safetensors import write_tensors
from pycircuit.trace import CheckpointError
from pycircuit.trace.checkpoint import digest
from pycircuit.transcoders import CrossLayerTranscoder, PerLayerTranscoders

from .history import History
from .learner import Learner, Scale
from .recipe import Recipe
from .schedule import Schedule
from .stream import Source

MAY_DIFFER = ("steps",)  # fields of the recipe that may change when a run goes on
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True, eq=False)
class SavedRun:
    """A checkpoint as it was read. run: recipe and digests; start: what Schedule remembers beside the recipe."""

    tensors: dict[str, Tensor]
    run: dict[str, Any]
    start: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        """Recipe of the run that wrote it."""
        fields = dict(self.run["recipe"])
        k = fields["k"]
        return Recipe(**{**fields, "k": tuple(k) if isinstance(k, list) else k})

    @property
    def schedule(self) -> Schedule:
        """Schedule of the run that wrote it."""
        return Schedule(self.recipe, **self.start)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.tensors["measured"])

    @property
    def scales(self) -> tuple[Scale, Scale]:
        """Scales of what transcoders read and of what they write."""
        x, y = (Scale(self.tensors[f"mean.{name}"], self.tensors[f"scale.{name}"]) for name in ("x", "y"))
        return x, y

    @property
    def history(self) -> History:
        """Measurements up to the checkpoint."""
        return History.of(self.tensors["measured"].cpu(), self.tensors["held_out"].cpu())

    def transcoders(self) -> PerLayerTranscoders | CrossLayerTranscoder:
        """Transcoders of the weights, in the model's own units."""
        bias = self.tensors["weight.b_dec"]
        depth, width = bias.shape
        learner = Learner(self.recipe, depth, width, bias.dtype, bias.device)
        self.restore(learner)
        return learner.transcoders(*self.scales)

    def restore(self, learner: Learner) -> None:
        """Copy the weights into a learner of this recipe."""
        learner.cutoff = self.tensors["cutoff"].tolist()
        with torch.no_grad():
            for name, t in learner.tensors().items():
                t.copy_(self.tensors[f"weight.{name}"])


def identity(recipe: Recipe, source: Source, sequences: list[Tensor]) -> dict[str, Any]:
    """Recipe and digests that a checkpoint must agree with."""
    weights = [p for _, p in sorted(source.model.named_parameters())]
    return {
        "recipe": dataclasses.asdict(recipe),
        "model": digest(weights),
        "texts": digest(sequences),
        "ignore": source.ignore,
    }


def save(path: Path, run: Mapping[str, Any], schedule: Schedule, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint, with the digest of its tensors."""
    start = {"start": schedule.start, "rate": schedule.rate, "sparsity": schedule.sparsity}
    metadata = {"run": json.dumps(run), "schedule": json.dumps(start), "digest": _digest_of(tensors)}
    replace_file("train", path, lambda file: write_tensors(file, tensors, metadata))


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    digests = {name: digest(t) for name, t in tensors.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def load(path: Path, run: Mapping[str, Any], device: str) -> SavedRun | None:
    """Read the checkpoint of this run; None if there is no file yet."""
    if not path.exists():
        return None
    saved = read("train", path, device)
    differing = list(_differences(saved.run, run))
    if differing:
        raise CheckpointError(
            f"train: checkpoint must be of this run, got one that differs in {', '.join(differing)}; use another "
            f"file or remove {path}"
        )
    steps = run["recipe"]["steps"]
    if steps < saved.steps:
        raise CheckpointError(
            f"train: steps must be at least the {saved.steps} of the checkpoint {path}, got {steps}; give more steps, "
            "or export the checkpoint as it is"
        )
    return saved


def read(op: str, path: Path, device: str) -> SavedRun:
    """Read a checkpoint of any run."""
    try:
        with safe_open(path, "pt", device=device) as file:
            metadata = file.metadata() or {}
            run, start = dict(json.loads(metadata["run"])), dict(json.loads(metadata["schedule"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{op}: checkpoint must be a file of an earlier run, got {path}: {error}") from None
    if metadata.get("digest") != _digest_of(tensors):
        raise CheckpointError(
            f"{op}: checkpoint must be a file as it was written, got {path} with another digest; remove it"
        )
    return SavedRun(tensors, run, start)


def _differences(saved: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Names of what differs between two runs, fields of the recipe with both values."""
    fields = saved.get("recipe")
    if not isinstance(fields, dict):
        return [name for name in run if saved.get(name) != run[name]]
    fields = {field.name: field.default for field in dataclasses.fields(Recipe)} | fields  # an older one has fewer
    now = json.loads(json.dumps(run["recipe"]))  # tuples as lists, as they were written
    names = [name for name in {**fields, **now} if name not in MAY_DIFFER and fields.get(name) != now.get(name)]
    differing = [f"recipe.{name} ({fields.get(name)} there, {now.get(name)} now)" for name in names]
    for name in run:
        if name != "recipe" and saved.get(name) != run[name]:
            values = f" ({saved.get(name)} there, {run[name]} now)" if isinstance(run[name], int) else ""
            differing.append(f"{name}{values}")
    return differing


def from_checkpoint(
    checkpoint: str | PathLike[str], device: str | torch.device | None = None
) -> PerLayerTranscoders | CrossLayerTranscoder:
    """Transcoders of a checkpoint of pc.train or `pycircuit train`, finished or not, in the model's own units."""
    return read("from_checkpoint", Path(checkpoint), str(device or "cpu")).transcoders()
