"""Measurements of a training run, and their figure."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from torch import Tensor

from pycircuit.files.atomic import writable_svg, write_text

from .figure import Panel, chart


@dataclass(frozen=True, eq=False)
class HeldOutCurve:
    """Measures on held-out text while a run went on. steps, agreement: [evaluations]; variance: [evaluations, layers].

    steps: those done before the evaluation. agreement: share of places where model and replacement model agree on the
    next token. variance: the share explained.
    """

    steps: Tensor
    agreement: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class History:
    """Measurements of every step. loss: [steps]; the others: [steps, layers].

    loss: unexplained variance summed over layers, plus the penalty. variance: the share explained. active: features a
    token. dead: the share of features silent for `revive` steps (1,000 if that is 0). held_out: on other text.
    """

    loss: Tensor
    variance: Tensor
    active: Tensor
    dead: Tensor
    held_out: HeldOutCurve

    @classmethod
    def of(cls, measured: Tensor, held_out: Tensor) -> History:
        """History of a trainer's rows. measured: [steps, 1 + 3 layers]; held_out: [evaluations, 2 + layers]."""
        curve = HeldOutCurve(held_out[:, 0].long(), held_out[:, 1], held_out[:, 2:])
        variance, active, dead = measured[:, 1:].chunk(3, 1)
        return cls(measured[:, 0], variance, active, dead, curve)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the measurements over the steps as SVG, one line a layer."""

        def by_layer(t: Tensor) -> dict[str, list[float]]:
            return {f"layer {layer}": column.tolist() for layer, column in enumerate(t.unbind(1))}

        lines = {
            "loss": {"all layers": self.loss.tolist()},
            "variance explained": by_layer(self.variance),
            "features a token": by_layer(self.active),
            "silent features": by_layer(self.dead),
        }
        last_step = str(len(self.loss))
        panels = [Panel(title, by_name, "step 1", last_step) for title, by_name in lines.items()]
        steps = self.held_out.steps.tolist()
        if steps:
            ends = f"step {steps[0]}", str(steps[-1])
            panels.append(Panel("held-out variance", by_layer(self.held_out.variance), *ends))
            panels.append(Panel("next token agrees", {"all layers": self.held_out.agreement.tolist()}, *ends))
        write_text("plot", writable_svg("plot", path), chart(panels))
