"""The training loop: batches, gradients, Adam, revival of silent features, measurements and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import inf
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import Unpack  # of torch; in typing from Python 3.11

from pycircuit.ops.dispatch import Request, plan
from pycircuit.ops.torch_settings import without_autocast
from pycircuit.progress import Progress, Report
from pycircuit.transcoders import CrossLayerTranscoder, PerLayerTranscoders

from . import trainer_state
from .checkpoint_writer import CheckpointWriter
from .deferred_interrupt import deferred_interrupt
from .held_out import HeldOutPlan
from .history import History
from .learner import Learner, Scale
from .massive import MassiveFeature, find_massive, replace_massive
from .processes import Processes
from .recipe import PENALISED, Recipe, RecipeOptions
from .schedule import Schedule
from .sources import Model, Texts, Tokenizer, source_of, split_to_context, token_ids
from .stream import Buffer, Stream
from .trainer_state import SavedRun
from .watch import Watch

if TYPE_CHECKING:
    from .fused_step import FusedStep  # needs the native module

_TOKENS_PER_ROW = 16  # from which initial rows are drawn


class Trainer:
    """A training run, shared by all processes if torch.distributed is initialised.

    A shared batch holds the same tokens as with one process. Each process computes those of its own sequences,
    gradients are summed, and all processes get the same weights.
    """

    def __init__(
        self,
        model: Model,
        texts: Texts,
        recipe: Recipe,
        tokenizer: Tokenizer | None = None,
        ignore_positions: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.processes = Processes()
        self.source = source_of("train", model, recipe.read_site, recipe.writes, ignore_positions)
        weights = self.source.weights
        self.model, self.tokenizer = model, tokenizer
        source = replace(self.source, precision=recipe.forward)
        self.stream = Stream(source, self.sequences(texts), recipe, self.processes.rank, self.processes.world)
        self.show = Progress(False)
        depth = len(weights.layers)
        if isinstance(recipe.k, tuple) and len(recipe.k) != depth:
            raise ValueError(f"train: k must be one number, or one for each of the {depth} layers, got {recipe.k}")
        self.learner = Learner(recipe, depth, weights.width, weights.dtype, weights.device)
        self.parameters = self.learner.tensors()
        self.adam = torch.optim.Adam(self.parameters.values(), lr=recipe.learning_rate, fused=True)
        self.fused = self._fused()
        self.buffer: Buffer | None = None
        self.steps_done = 0
        self.last_active = torch.zeros(depth, recipe.features, dtype=torch.int64, device=weights.device)  # a step
        self.measurements = torch.zeros(recipe.steps, 1 + 3 * depth, dtype=torch.float64)
        self.held_out = torch.zeros(0, 2 + depth, dtype=torch.float64)  # step, agreement, variance of every layer
        self.schedule = Schedule(recipe)
        self.scales: tuple[Scale, Scale] | None = None  # of x and y, from the first buffer
        self.massive: dict[int, MassiveFeature] = {}  # by layer, from the first buffer
        self.massive_norms = [inf] * depth  # from which an output is massive

    def _fused(self) -> FusedStep | None:
        """Steps by native kernels, for runs that they cover; None: by autograd."""
        recipe, source = self.recipe, self.source
        covered = recipe.kind == "plt" and recipe.activation not in PENALISED
        if not covered or self.processes.shared or recipe.precision != "float32":
            return None
        if plan(Request("decode", source.device.type, (source.dtype,))).implementation != "native":
            return None
        from .fused_step import FusedStep

        return FusedStep(self.learner, self.adam)

    def sequences(self, texts: Texts) -> list[Tensor]:
        """Token ids of texts, split to the context."""
        weights, context = self.source.weights, self.recipe.context
        sequences = token_ids("train", texts, self.model, self.tokenizer, weights.vocabulary)
        return split_to_context("train", sequences, min(context, weights.longest or context), self.source.ignore)

    @property
    def history(self) -> History:
        """Measurements of the steps so far."""
        return History.of(self.measurements[: self.steps_done], self.held_out)

    def transcoders(self) -> PerLayerTranscoders | CrossLayerTranscoder:
        """Transcoders of the weights so far, in the model's own units."""
        if self.scales is None:
            raise RuntimeError("train: the run must have begun before its transcoders are taken; call run()")
        return self.learner.transcoders(*self.scales)

    @without_autocast()
    def run(
        self,
        checkpoint: str | PathLike[str] | None = None,
        every: int = 100,
        progress: bool | Report = True,
        *,
        minutes: float = 5.0,
        held_out: HeldOutPlan | None = None,
    ) -> PerLayerTranscoders | CrossLayerTranscoder:
        """Train to the end, from the checkpoint if its file exists, and return the transcoders.

        every, minutes: steps and minutes after which the checkpoint is written, whichever come first; it is also
        written at the end and after Ctrl-C. held_out: text to evaluate on meanwhile.
        """
        if type(every) is not int or every < 1:
            raise ValueError(f"train: every must be at least 1, got {every!r}")
        if not minutes > 0:
            raise ValueError(f"train: minutes must be positive, got {minutes!r}")
        path = None if checkpoint is None else Path(checkpoint)
        identity = trainer_state.identity(self.recipe, self.source, self.stream.sequences) if path else {}
        if path:
            self._restore(trainer_state.load(path, identity, str(self.source.weights.device)))
        writer = CheckpointWriter(path if self.stream.rank == 0 else None, identity, every, minutes)
        self.show = show = Progress(progress if self.stream.rank == 0 else False)
        total = self.recipe.steps * self.recipe.batch
        if self.recipe.forward == "bfloat16" and not self.stream.source.in_bfloat16:
            show.say("training: the model's forward is in float32, this processor does not multiply bfloat16")
        show.step("training", self.steps_done * self.recipe.batch, total, "tokens")
        in_step = False
        try:
            watch = Watch(self, held_out) if held_out else None
            if watch and watch.exhausted:
                return self.transcoders()
            for rows, batch_index in self._batches():
                in_step = True
                with deferred_interrupt():
                    self._step(rows, batch_index)
                    in_step = False
                show.step("training", self.steps_done * self.recipe.batch, total, "tokens", self._note)
                stopping = watch is not None and watch.evaluate()
                if writer.is_due(self.steps_done, stopping or self.steps_done == self.recipe.steps):
                    writer.write(self.schedule, self._state())
                if stopping:
                    break
        except KeyboardInterrupt:
            if self.steps_done and not in_step:
                writer.write(self.schedule, self._state())
            raise
        finally:
            show.close()
        return self.transcoders()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices into the buffer, batch_index) of each remaining step: [local tokens] twice."""
        first_batch, size = 0, self.recipe.batch
        for number, group in enumerate(self.stream.groups()):
            if self.steps_done == self.recipe.steps:
                return
            count = self.stream.batches_in(group)
            if first_batch + count > self.steps_done:
                self.buffer = None  # before the next is made
                self.buffer = self.stream.buffer(number, group, partial(self.show.step, "activations", unit="tokens"))
                self._normalise(self.buffer)
                if self.steps_done == 0:
                    self._start_from_tokens(self.buffer)
                for batch in range(self.steps_done - first_batch, count):
                    if self.steps_done == self.recipe.steps:
                        return
                    yield self.buffer.batch(batch, size)
            first_batch += count

    def _normalise(self, buffer: Buffer) -> None:
        """Normalise a buffer in place, by the mean and the scale of the first, without its massive outputs."""
        if self.scales is None:
            self.massive = find_massive(
                self.source, self.stream.sequences, buffer.x, buffer.y, self.recipe.massive, self.processes.shared
            )
            self.massive_norms = [self.massive[i].norm if i in self.massive else inf for i in range(len(buffer.x))]
        replace_massive(buffer.x, buffer.y, self.massive_norms)
        if self.scales is None:
            self.scales = self._scale(buffer.x, self.recipe.centre), self._scale(buffer.y)
        for scale, t in zip(self.scales, (buffer.x, buffer.y), strict=True):
            scale.apply_(t)

    def _activations(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Activations (x, y) of tokens of the buffer: [layers, local tokens, width] each."""
        assert self.buffer is not None
        return self.buffer.x[:, rows], self.buffer.y[:, rows]

    def _start_from_tokens(self, buffer: Buffer) -> None:
        """Initialise linear paths, and rows where the recipe says so, from enough tokens that rare ones are there."""
        from_tokens = self.recipe.rows == "tokens"
        if not from_tokens and not self.recipe.skip:
            return
        count = min(len(buffer.row), max(self.recipe.batch, _TOKENS_PER_ROW * self.recipe.features))
        rows, batch_index = buffer.batch(0, count)
        x, y = (self.processes.gather(t[:, rows], batch_index, count) for t in (buffer.x, buffer.y))
        self.learner.skip_from_tokens(x, y)
        if from_tokens:
            y = self.learner.without_skip(x, y)
            self.learner.rows_from_tokens(x, y, partial(self.show.step, "initial rows", unit="layers"))

    def _scale(self, x: Tensor, centre: bool = True) -> Scale:
        """Mean and scale of x [layers, positions, width] over all processes."""
        total = torch.stack([layer.double().sum(0) for layer in x]).flatten()
        square = torch.stack([layer.double().square().sum() for layer in x])
        sums = torch.cat([total, square, x.new_tensor([x.shape[1]])])
        self.processes.sum(sums)
        total, square = sums[: x.shape[0] * x.shape[2]].view(x.shape[0], -1), sums[-x.shape[0] - 1 : -1]
        scale = Scale.of(total, square, int(sums[-1]), centre)
        return Scale(scale.mean.to(x.dtype), scale.scale.to(x.dtype))

    def _initialise(self, rows: Tensor, batch_index: Tensor) -> None:
        """Set thresholds, and the scale of decoders that begin as tokens, from the first batch."""
        scaled = self.recipe.rows == "tokens"
        if self.recipe.activation not in PENALISED and not scaled:
            return
        x, y = (self.processes.gather(t, batch_index, self.recipe.batch) for t in self._activations(rows))
        self.learner.set_thresholds(x)
        if scaled:
            self.learner.scale_decoders(x, y)

    def _step(self, rows: Tensor, batch_index: Tensor) -> None:
        """Take a step on tokens of the buffer. rows, batch_index: [local tokens]."""
        step = self.steps_done
        if step == 0:
            self._initialise(rows, batch_index)
            for layer, feature in self.massive.items():
                assert self.scales
                self.learner.set_massive(layer, feature, *self.scales)
        error = self._fused_step(step, rows) if self.fused else self._taped_step(step, rows, batch_index)
        if self.schedule.revives_at(step):
            x, _ = self._activations(rows)
            self._revive(*(self.processes.gather(t, batch_index, self.recipe.batch) for t in (x, -error)))
        self.steps_done = step + 1

    def _taped_step(self, step: int, rows: Tensor, batch_index: Tensor) -> Tensor:
        """Take a step by autograd and torch's Adam; return the error [layers, local tokens, width]."""
        recipe = self.recipe
        x, y = self._activations(rows)
        forward = self.learner.forward(x, batch_index if self.processes.shared else None)
        error = forward.recon - y
        unexplained = error.square().sum((1, 2)) / (recipe.batch * x.shape[2])
        loss = unexplained.sum()
        if recipe.activation in PENALISED:
            loss = loss + self.schedule.sparsity_at(step) / recipe.batch * self.learner.penalty(forward)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        for t in self.parameters.values():
            assert t.grad is not None  # every parameter takes part in every step
            self.processes.sum(t.grad)
        self.adam.param_groups[0]["lr"] = self.schedule.rate_at(step)
        self.adam.step()
        error = error.detach()
        active = [
            entries.index[value.detach() > 0] for entries, value in zip(forward.entries, forward.values, strict=True)
        ]
        squares = torch.stack([t.double().square().sum((1, 2)) for t in (error, y)], 1)
        self._measure(step, float(loss.detach()), squares, active)
        return error

    def _fused_step(self, step: int, rows: Tensor) -> Tensor:
        """Take a step by native kernels, layer by layer; return the error where features are to be revived."""
        assert self.fused and self.buffer
        scale = 2 / (self.recipe.batch * self.source.width)
        self.fused.start(step, self.schedule.rate_at(step))
        squares, active, bias, errors = [], [], [], []
        for layer, (x, y) in enumerate(zip(self.buffer.x, self.buffer.y, strict=True)):
            done = self.fused.layer(layer, x[rows], y[rows], scale)
            squares.append(done.squares)
            active.append(done.entries.index)
            bias.append(done.gradient.sum(0))
            if self.schedule.revives_at(step):
                errors.append(done.gradient / scale)
        self.fused.biases(torch.stack(bias))
        loss = float(torch.stack(squares)[:, 0].sum() * scale / 2)
        self._measure(step, loss, torch.stack(squares), active)
        return torch.stack(errors) if errors else torch.empty(0)

    def _measure(self, step: int, loss: float, squares: Tensor, active: list[Tensor]) -> None:
        """Write the measurements of a step: loss, then explained variance, active and dead features of each layer.

        squares: [layers, 2] float64, of the error and of y; active: the feature of every active entry, by layer.
        """
        for layer, features in enumerate(active):
            self.last_active[layer, features] = step + 1
            if self.massive_norms[layer] < inf:
                self.last_active[layer, 0] = step + 1  # its tokens are in no batch
        counts = torch.tensor([len(features) for features in active], dtype=torch.float64)
        sums = torch.cat([torch.tensor([loss]).double(), squares.T.flatten().cpu(), counts])
        self.processes.sum(sums)
        self.processes.maximum(self.last_active)
        unexplained, total, count = sums[1:].chunk(3)
        dead = self._silent(step + 1).double().mean(1).cpu()
        self.measurements[step] = torch.cat([sums[:1], 1 - unexplained / total, count / self.recipe.batch, dead])

    def _silent(self, steps_done: int) -> Tensor:
        """Mask of features that were not active in the last `revive` steps: [layers, features]."""
        return self.last_active + (self.recipe.revive or 1000) <= steps_done

    def _revive(self, x: Tensor, error: Tensor) -> None:
        """Give silent features new rows. x: [layers, batch, width]; error: target - reconstruction, the same shape."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.steps_done)
        for layer, silent in enumerate(self._silent(self.steps_done + 1)):
            features = silent.nonzero()[:, 0]
            if len(features):
                slots = error[layer : layer + self.learner.slots(layer)]
                self.learner.revive(layer, features, x[layer], slots, generator)
                self._reset_moments(layer, features)

    def _reset_moments(self, layer: int, features: Tensor) -> None:
        """Set Adam's moments of some features' rows to zero."""
        for name in ("w_enc", "b_enc", "w_dec", "log_theta"):
            t = self.parameters.get(f"{name}.{layer}")
            for moment in ("exp_avg", "exp_avg_sq") if t is not None else ():
                moments = self.adam.state[t][moment]  # type: ignore[index]
                (moments.transpose(0, 1) if name == "w_dec" else moments)[features] = 0

    def _note(self) -> str:
        """Measurements of the last step, for the line of progress."""
        row = self.measurements[self.steps_done - 1]
        variance, active, dead = (float(t.mean()) for t in row[1:].chunk(3))
        return f"loss {row[0]:.4f}, variance explained {variance:.3f}, L0 {active:.1f}, dead {100 * dead:.1f}%"

    def _state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint, by name."""
        assert self.scales is not None  # a step has been made
        state = {f"weight.{name}": t for name, t in self.parameters.items()}
        for name, t in self.parameters.items():
            for moment in trainer_state.MOMENTS:
                state[f"{moment}.{name}"] = self.adam.state[t][moment]
        for name, scale in zip(("x", "y"), self.scales, strict=True):
            state[f"mean.{name}"], state[f"scale.{name}"] = scale.mean, scale.scale
        cutoff = torch.tensor(self.learner.cutoff, dtype=torch.float64)
        measured = {"measured": self.measurements[: self.steps_done], "held_out": self.held_out}
        massive = torch.tensor(self.massive_norms, dtype=torch.float64)
        return {**state, **measured, "heard": self.last_active, "cutoff": cutoff, "massive": massive}

    def _restore(self, saved: SavedRun | None) -> None:
        """Continue from a checkpoint; None: from the start."""
        if saved is None:
            return
        state = saved.tensors
        self.steps_done = saved.steps
        self.schedule = saved.schedule.changed(self.recipe, saved.steps)
        self.measurements[: self.steps_done] = state["measured"].cpu()
        self.held_out = state["held_out"].cpu()
        self.last_active = state["heard"]
        self.scales, self.massive_norms = saved.scales, state["massive"].tolist()
        saved.restore(self.learner)
        for name, t in self.parameters.items():
            self.adam.state[t] = {
                "step": torch.tensor(float(self.steps_done), device=t.device),
                **{moment: state[f"{moment}.{name}"] for moment in trainer_state.MOMENTS},
            }


def train(
    model: Model,
    texts: Texts,
    *,
    features: int,
    tokenizer: Tokenizer | None = None,
    ignore_positions: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 100,
    minutes: float = 5.0,
    held_out: Texts | HeldOutPlan | None = None,
    progress: bool | Report = True,
    **options: Unpack[RecipeOptions],
) -> PerLayerTranscoders | CrossLayerTranscoder:
    """Train transcoders on texts or token ids: `pc.train(model, texts, kind="clt", features=4096, k=32)`.

    model: a transformers causal model, or a ReplacementModel. options: the fields of pycircuit.training.Recipe.
    checkpoint: a file that is written after every `every` steps or `minutes`; if it exists, the run continues from it
    and ends as it would have without the stop, bit for bit on a CPU with the same number of threads. With another
    number of steps it continues too, and its rate changes without a jump. held_out: texts to evaluate on meanwhile, or
    a plan that also says how often, and when to stop early. progress: True, False, or a function (phase, done, total).
    """
    unknown = sorted(set(options) - set(Recipe.__dataclass_fields__))
    if unknown:
        known = ", ".join(Recipe.__dataclass_fields__)
        raise TypeError(f"train: options must be among {known}, got {', '.join(unknown)}")
    trainer = Trainer(model, texts, Recipe(features=features, **options), tokenizer, ignore_positions)
    plan = held_out if held_out is None or isinstance(held_out, HeldOutPlan) else HeldOutPlan(held_out)
    return trainer.run(checkpoint, every, progress, minutes=minutes, held_out=plan)
