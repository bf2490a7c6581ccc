"""Measurements of a training run, and their figure."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

from torch import Tensor

from pycircuit.files.atomic import writable_svg, write_text

from .figure import Panel, chart


@dataclass(frozen=True, eq=False)
class History:
    """Measurements of every step. loss: [steps]; the others: [steps, layers].

    loss: unexplained variance summed over layers, plus the penalty. variance: the share explained. active: features a
    token. dead: the share of features silent for `revive` steps (1,000 if that is 0).
    """

    loss: Tensor
    variance: Tensor
    active: Tensor
    dead: Tensor

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
        write_text("plot", writable_svg("plot", path), chart(panels))
