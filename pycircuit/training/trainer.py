"""The loop: batches in, gradients, Adam, new rows for silent features, and what is reported on the way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pycircuit.files.atomic import writable_svg, write_text
from pycircuit.ops.torch_settings import without_autocast
from pycircuit.progress import Progress, Report
from pycircuit.trace.checkpoint import digest
from pycircuit.transcoders import CrossLayerTranscoder, PerLayerTranscoders

from . import trainer_state as file
from .figure import Panel, chart
from .learner import Found, Learner, Scale
from .recipe import PENALISED, Recipe
from .sources import Texts, pieces, source_of, token_ids
from .stream import Buffer, Stream

_SOWN = 16  # tokens a feature, of which rows are drawn


@dataclass(frozen=True, eq=False)
class History:
    """What was measured at every step. loss: [steps]; the others [steps, layers].

    loss: unexplained variance summed over layers, and the penalty. variance: the share explained. active: features a
    token. dead: the share of features silent for `revive` steps (1,000 if that is 0).
    """

    loss: Tensor
    variance: Tensor
    active: Tensor
    dead: Tensor

    def plot(self, path: str | PathLike[str]) -> None:
        """An SVG of all of it over the steps, one line a layer."""

        def by_layer(t: Tensor) -> dict[str, list[float]]:
            return {f"layer {layer}": column.tolist() for layer, column in enumerate(t.unbind(1))}

        lines = {
            "loss": {"all layers": self.loss.tolist()},
            "variance explained": by_layer(self.variance),
            "features a token": by_layer(self.active),
            "silent features": by_layer(self.dead),
        }
        end = str(len(self.loss))
        write_text(
            "plot",
            writable_svg("plot", path),
            chart([Panel(title, held, "step 1", end) for title, held in lines.items()]),
        )


class Trainer:
    """One run. With torch.distributed initialised, every process makes one of these and gets the same weights.

    A batch is then the same tokens as with one process; each works on those of its own sequences, and gradients are
    summed.
    """

    def __init__(
        self, model: Any, texts: Texts, recipe: Recipe, tokenizer: Any = None, ignore_positions: int | None = None
    ) -> None:
        self.recipe = recipe
        self.shared = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if self.shared else (0, 1)
        self.source = source_of("train", model, recipe.read, recipe.writes, ignore_positions)
        weights = self.source.weights
        sequences = token_ids("train", texts, model, tokenizer, weights.vocabulary)
        context = min(recipe.context, weights.longest or recipe.context)
        self.stream = Stream(self.source, pieces("train", sequences, context, self.source.ignore), recipe, rank, world)
        depth = len(weights.layers)
        if isinstance(recipe.k, tuple) and len(recipe.k) != depth:
            raise ValueError(f"train: k must be one number, or one for each of the {depth} layers, got {recipe.k}")
        self.learner = Learner(recipe, depth, weights.width, weights.dtype, weights.device)
        self.named = self.learner.tensors()
        self.adam = torch.optim.Adam(self.named.values(), lr=recipe.learning_rate, fused=True)
        self.done = 0
        self.heard = torch.zeros(depth, recipe.features, dtype=torch.int64, device=weights.device)  # step last active
        self.measured = torch.zeros(recipe.steps, 1 + 3 * depth, dtype=torch.float64)
        self.scales: tuple[Scale, Scale] | None = None

    @property
    def history(self) -> History:
        part = self.measured[: self.done]
        variance, active, dead = part[:, 1:].chunk(3, 1)
        return History(part[:, 0], variance, active, dead)

    def transcoders(self) -> PerLayerTranscoders | CrossLayerTranscoder:
        """As they are now, in the model's own units."""
        if self.scales is None:
            raise RuntimeError("train: the run must have begun before its transcoders are taken; call run()")
        return self.learner.transcoders(*self.scales)

    @without_autocast()
    def run(
        self,
        checkpoint: str | PathLike[str] | None = None,
        every: int = 100,
        progress: bool | Report = True,
    ) -> PerLayerTranscoders | CrossLayerTranscoder:
        """To the end, from the checkpoint if there is one; it is written every so many steps, at the end
        and after Ctrl-C."""
        if type(every) is not int or every < 1:
            raise ValueError(f"train: every must be at least 1, got {every!r}")
        path = None if checkpoint is None else Path(checkpoint)
        about = self._about() if path else {}
        if path:
            self._restore(file.load(path, about, str(self.source.weights.device)))
        show = Progress(progress if self.stream.rank == 0 else False)
        show.step("training", 0, self.recipe.steps * self.recipe.batch, "tokens")
        whole = True  # no step is half done
        try:
            for rows in self._batches():
                whole = False
                with _undisturbed():
                    self._step(*rows)
                    whole = True
                tokens = self.done * self.recipe.batch
                show.step("training", tokens, self.recipe.steps * self.recipe.batch, "tokens", self._note)
                if path and self.stream.rank == 0 and (self.done % every == 0 or self.done == self.recipe.steps):
                    file.save(path, about, self._state())
        except KeyboardInterrupt:
            if path and self.stream.rank == 0 and self.done and whole:
                file.save(path, about, self._state())
            raise
        finally:
            show.close()
        return self.transcoders()

    def _batches(self) -> Any:
        """(x, y, places) of every step that is left: [layers, held, width] twice, [held]."""
        at, size = 0, self.recipe.batch
        for number, group in enumerate(self.stream.groups()):
            if self.done == self.recipe.steps:
                return
            count = self.stream.batches_in(group)
            if at + count > self.done:
                buffer = self.stream.buffer(number, group)
                if self.scales is None:
                    self.scales = self._scales(buffer.x), self._scales(buffer.y)
                for scale, t in zip(self.scales, (buffer.x, buffer.y), strict=True):
                    scale.apply_(t)
                if self.done == 0 and self.recipe.rows == "tokens":
                    self._sow(buffer)
                for batch in range(self.done - at, count):
                    if self.done == self.recipe.steps:
                        return
                    rows, places = buffer.batch(batch, size)
                    yield buffer.x[:, rows], buffer.y[:, rows], places
                del buffer
            at += count

    def _sow(self, buffer: Buffer) -> None:
        """Rows from enough tokens that rare ones are among them."""
        count = min(len(buffer.order), max(self.recipe.batch, _SOWN * self.recipe.features))
        rows, places = buffer.batch(0, count)
        self.learner.sow(*(self._whole(t[:, rows], places, count) for t in (buffer.x, buffer.y)))

    def _scales(self, x: Tensor) -> Scale:
        sums = torch.cat([x.double().sum(1).flatten(), x.double().square().sum((1, 2)), x.new_tensor([x.shape[1]])])
        self._add_up(sums)
        total, square = sums[: x.shape[0] * x.shape[2]].view(x.shape[0], -1), sums[-x.shape[0] - 1 : -1]
        scale = Scale.of(total, square, int(sums[-1]))
        return Scale(scale.mean.to(x.dtype), scale.scale.to(x.dtype))

    def _add_up(self, t: Tensor, how: Any = None) -> None:
        """Over all processes, in place."""
        if self.shared:
            dist.all_reduce(t, dist.ReduceOp.SUM if how is None else how)

    def _whole(self, x: Tensor, places: Tensor, count: int) -> Tensor:
        """With the other processes' tokens in it: [layers, count, width]."""
        if not self.shared:
            return x
        whole = x.new_zeros(x.shape[0], count, x.shape[2])
        whole[:, places] = x
        self._add_up(whole)
        return whole

    def _step(self, x: Tensor, y: Tensor, places: Tensor) -> None:
        recipe, step = self.recipe, self.done
        if step == 0:
            whole = self._whole(x, places, recipe.batch)
            self.learner.open(whole)
            if recipe.rows == "tokens":
                self.learner.fit(whole, self._whole(y, places, recipe.batch))
        found = self.learner.forward(x, places if self.shared else None)
        error = found.recon - y
        unexplained = error.square().sum((1, 2)) / (recipe.batch * x.shape[2])
        loss = unexplained.sum()
        if recipe.activation in PENALISED:
            loss = loss + recipe.sparsity_at(step) / recipe.batch * self.learner.penalty(found)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        for t in self.named.values():
            assert t.grad is not None  # everything takes part in every step
            self._add_up(t.grad)
        self.adam.param_groups[0]["lr"] = recipe.rate_at(step)
        self.adam.step()
        self._measure(step, float(loss.detach()), error.detach(), y, found)
        if recipe.revives_at(step):
            self._revive(*(self._whole(t, places, recipe.batch) for t in (x, -error.detach())))
        self.done = step + 1

    def _measure(self, step: int, loss: float, error: Tensor, y: Tensor, found: Found) -> None:
        active = []
        for layer, (entries, value) in enumerate(zip(found.entries, found.values, strict=True)):
            on = entries.index[value.detach() > 0]
            self.heard[layer, on] = step + 1
            active.append(float(len(on)))
        sums = torch.stack([t.double().square().sum((1, 2)) for t in (error, y)]).flatten().cpu()
        sums = torch.cat([torch.tensor([loss]).double(), sums, torch.tensor(active).double()])
        self._add_up(sums)
        if self.shared:
            self._add_up(self.heard, dist.ReduceOp.MAX)
        missed, there, count = sums[1:].chunk(3)
        dead = self._silent(step + 1).double().mean(1).cpu()
        self.measured[step] = torch.cat([sums[:1], 1 - missed / there, count / self.recipe.batch, dead])

    def _silent(self, done: int) -> Tensor:
        """[layers, features]: not active in the last `revive` steps."""
        return self.heard + (self.recipe.revive or 1000) <= done

    def _revive(self, x: Tensor, error: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.done)
        for layer, silent in enumerate(self._silent(self.done + 1)):
            which = silent.nonzero()[:, 0]
            if len(which):
                slots = error[layer : layer + self.learner.slots(layer)]
                self.learner.revive(layer, which, x[layer], slots, generator)
                self._forget(layer, which)

    def _forget(self, layer: int, which: Tensor) -> None:
        """Adam's moments of rows that are new."""
        for name in ("w_enc", "b_enc", "w_dec", "log_theta"):
            t = self.named.get(f"{name}.{layer}")
            for moment in ("exp_avg", "exp_avg_sq") if t is not None else ():
                held = self.adam.state[t][moment]  # type: ignore[index]
                (held.transpose(0, 1) if name == "w_dec" else held)[which] = 0

    def _note(self) -> str:
        _, variance, active, dead = (float(t) for t in self._last())
        return (
            f"loss {self.measured[self.done - 1, 0]:.4f}, variance explained {variance:.3f}, "
            f"L0 {active:.1f}, dead {100 * dead:.1f}%"
        )

    def _last(self) -> list[Tensor]:
        row = self.measured[self.done - 1]
        return [row[0], *(part.mean() for part in row[1:].chunk(3))]

    def _about(self) -> dict[str, Any]:
        """What makes two runs the same."""
        model = self.source.model
        weights = [p for _, p in sorted(model.named_parameters())]
        return {
            "recipe": asdict(self.recipe),
            "model": digest(weights),
            "texts": digest(self.stream.sequences),
            "ignore": self.source.ignore,
        }

    def _state(self) -> dict[str, Tensor]:
        assert self.scales is not None  # a step has been made
        state = {f"weight.{name}": t for name, t in self.named.items()}
        for name, t in self.named.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}.{name}"] = self.adam.state[t][moment]
        for name, scale in zip(("x", "y"), self.scales, strict=True):
            state[f"mean.{name}"], state[f"scale.{name}"] = scale.mean, scale.scale
        cutoff = torch.tensor(self.learner.cutoff, dtype=torch.float64)
        return {**state, "heard": self.heard, "measured": self.measured[: self.done], "cutoff": cutoff}

    def _restore(self, state: dict[str, Tensor] | None) -> None:
        if state is None:
            return
        self.done = len(state["measured"])
        self.measured[: self.done] = state["measured"].cpu()
        self.heard, self.learner.cutoff = state["heard"], state["cutoff"].tolist()
        self.scales = (
            Scale(state["mean.x"], state["scale.x"]),
            Scale(state["mean.y"], state["scale.y"]),
        )
        with torch.no_grad():
            for name, t in self.named.items():
                t.copy_(state[f"weight.{name}"])
                self.adam.state[t] = {
                    "step": torch.tensor(float(self.done), device=t.device),
                    **{moment: state[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")},
                }


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; a handler of the program's own, or of another thread, is left alone."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def train(
    model: Any,
    texts: Texts,
    *,
    features: int,
    tokenizer: Any = None,
    ignore_positions: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 100,
    progress: bool | Report = True,
    **options: Any,
) -> PerLayerTranscoders | CrossLayerTranscoder:
    """Transcoders for a model, from texts or token ids: `pc.train(model, texts, kind="clt", features=4096, k=32)`.

    model: a transformers causal model (or a ReplacementModel that holds one). options: the fields of
    pycircuit.training.Recipe. checkpoint: a file that is written every so many steps; if it is there, the run goes on
    from it and ends exactly as it would have, bit for bit on a CPU with the same number of threads. progress: True,
    False, or a function (phase, done, total).
    """
    unknown = sorted(set(options) - set(Recipe.__dataclass_fields__))
    if unknown:
        known = ", ".join(Recipe.__dataclass_fields__)
        raise TypeError(f"train: options must be among {known}, got {', '.join(unknown)}")
    trainer = Trainer(model, texts, Recipe(features=features, **options), tokenizer, ignore_positions)
    return trainer.run(checkpoint, every, progress)
