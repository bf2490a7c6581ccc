"""Picture of a graph: its most influential nodes and the strongest path, drawn in as many columns as fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pycircuit.graph.paths import strongest_path
from pycircuit.ops import checks

from .boxes import choose, fit
from .node_names import Grouping
from .picture import Picture, draw

if TYPE_CHECKING:
    from pycircuit.graph.prune import Pruned


def plot(pruned: Pruned, max_nodes: int = 40, target: int = 0, group: Grouping = True, errors: bool = False) -> Picture:
    """Draw a pruned graph and the strongest path to a target."""
    checks.whole_number("plot", "max_nodes", max_nodes, 1)
    if not isinstance(errors, bool):
        raise TypeError(f"plot: errors must be True or False, got {type(errors).__name__}")
    graph = pruned.original
    graph.target_node(target)
    best = strongest_path(graph, target)
    path = [] if best is None else list(best.nodes)
    boxes, qualified = choose(pruned, max_nodes, path, group, errors)
    boxes, layout = fit(boxes, set(path), graph.tokens.text)
    left_out = qualified - sum(box.kind == "feature" for box in boxes)
    notes = [f"{left_out} weaker {'box' if left_out == 1 else 'boxes'} not drawn"] if left_out else []
    return Picture(draw(boxes, layout, path, graph.layers, notes))
