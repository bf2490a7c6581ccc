"""Learning rate and penalty of every step, also of a run that goes on with another number of steps."""

from __future__ import annotations

from dataclasses import dataclass

from .recipe import Recipe


@dataclass(frozen=True)
class Schedule:
    """Rate and penalty by step. A change of the number of steps moves neither of them by a jump.

    start: the step at which the number of steps was last changed, 0 if never; rate, sparsity: those of the step before.
    From there the rate rises over `warmup` steps to the plateau, and falls to zero over the last share of the run that
    the recipe says, or over what is left if that is less. The penalty grows from where it was.
    """

    recipe: Recipe
    start: int = 0
    rate: float = 0.0
    sparsity: float = 0.0

    def changed(self, recipe: Recipe, step: int) -> Schedule:
        """Schedule of a recipe with another number of steps, from a step on."""
        if step == 0 or recipe.steps == self.recipe.steps:
            return Schedule(recipe, self.start, self.rate, self.sparsity)
        return Schedule(recipe, step, self.rate_at(step - 1), self.sparsity_at(step - 1))

    @property
    def falling(self) -> float:
        """Number of last steps over which the rate falls."""
        return min(self.recipe.decay * self.recipe.steps, self.recipe.steps - self.start)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if not self.start:
            return self.recipe.rate_at(step)
        plateau, left = self.recipe.learning_rate, self.recipe.steps - step
        fall = min(1.0, left / self.falling) if self.falling >= 1 else 1.0
        risen = min(1.0, (step - self.start + 1) / max(1, self.recipe.warmup))
        return min(plateau * fall, self.rate + (plateau - self.rate) * risen)

    def sparsity_at(self, step: int) -> float:
        """Weight of the penalty in a step."""
        end = self.recipe.sparsity_rise * self.recipe.steps
        if not self.start:
            return self.recipe.sparsity_at(step)
        if step >= end:
            return self.recipe.sparsity
        return self.sparsity + (self.recipe.sparsity - self.sparsity) * (step - self.start) / (end - self.start)

    def revives_at(self, step: int) -> bool:
        """Return True if silent features get new rows after this step; never while the rate falls."""
        recipe, done = self.recipe, step + 1
        if not self.start:
            return recipe.revives_at(step)
        return bool(recipe.revive) and done % recipe.revive == 0 and done <= recipe.steps - self.falling
