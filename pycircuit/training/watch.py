"""Evaluation of a run while it goes on, the decision to stop it, and what an hour more would bring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .forecast import outlook
from .held_out import HeldOut, HeldOutPlan

if TYPE_CHECKING:
    from .trainer import Trainer


class Watch:
    """Evaluations of a trainer on held-out text, which are added to its `held_out`."""

    def __init__(self, trainer: Trainer, plan: HeldOutPlan) -> None:
        self.trainer, self.plan = trainer, plan
        self.every = plan.steps_between(trainer.recipe.steps)
        self.data = HeldOut(trainer.source, trainer.sequences(plan.texts), trainer.show)

    @property
    def exhausted(self) -> bool:
        """True once the run is to stop early."""
        return self.plan.exhausted(self.trainer.held_out[:, 2:])

    def evaluate(self) -> bool:
        """Evaluate if it is due after this step; return True if the run is to stop."""
        trainer = self.trainer
        steps = trainer.steps_done
        if steps % self.every and steps != trainer.recipe.steps:
            return False
        row = self.data.measure(trainer.transcoders(), trainer.show)
        if trainer.processes.shared:
            row = row.to(trainer.source.device)
            dist.broadcast(row, 0)  # last bits may differ between machines, a decision must not
            row = row.cpu()
        trainer.held_out = torch.cat([trainer.held_out, torch.cat([row.new_tensor([steps]), row])[None]])
        for line in self.lines():
            trainer.show.say(line)
        return self.exhausted

    def lines(self) -> list[str]:
        """Lines on the last evaluation."""
        row = self.trainer.held_out[-1]
        variance = row[2:]
        least = int(variance.nan_to_num(torch.inf).argmin())
        lines = [
            f"step {int(row[0])}, held-out text: variance explained {float(variance.nanmedian()):.3f} in the median "
            f"layer, {float(variance[least]):.3f} in layer {least}, the least; next token agrees {100 * row[1]:.1f}%"
        ]
        if self.exhausted:
            lines.append(f"stopping early: no rise of the mean over layers in {self.plan.patience} evaluations")
        return lines + outlooks(self.trainer)


def outlooks(trainer: Trainer) -> list[str]:
    """Sentences on what an hour more would bring, from the evaluations before the rate fell; none for too few."""
    recipe, rows = trainer.recipe, trainer.held_out
    rate = trainer.show.rate("training")
    level = rows[rows[:, 0] <= max(recipe.steps - trainer.schedule.falling, recipe.warmup)]
    level = level[level[:, 0] >= recipe.warmup]
    tokens = (level[:, 0] * recipe.batch).long().tolist()
    measures = {
        "the variance explained in the mean layer": level[:, 2:].nanmean(1),
        "the agreement on the next token": level[:, 1],
    }
    sentences = [outlook(tokens, measured.tolist(), rate, name) for name, measured in measures.items()]
    return [sentence for sentence in sentences if sentence is not None]
