"""Tree of a graph as indented text: a target, its strongest inputs, and theirs."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pycircuit.graph.paths import Path, strongest_path
from pycircuit.ops import checks

from .node_names import Grouping, name, percent, units

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph


class Line(NamedTuple):
    """A line of the tree. style: target, path (on the strongest path), node, token or error."""

    text: str
    style: str


class _Input(NamedTuple):
    """An input of a unit. unit: its lowest node, -1 for all errors; share: of all that enters, in absolute weights."""

    unit: int
    weight: float
    share: float


@dataclass
class _Branch:
    """A line to be: an input of the line above it. importance: the product of the shares from the target on."""

    input: _Input
    depth: int
    importance: float
    inputs: list[_Branch] = field(default_factory=list)


def lines(
    graph: Graph, target: int = 0, depth: int = 5, branches: int = 4, least: float = 0.1, errors: bool = False,
    group: Grouping = True, max_lines: int = 40,
) -> list[Line]:  # fmt: skip
    """Lines of the tree of a target's inputs, and of the strongest path to it."""
    op = "tree"
    for argument, value in (("depth", depth), ("branches", branches), ("max_lines", max_lines)):
        checks.whole_number(op, argument, value, 1)
    if not 0 <= checks.number(op, "least", least) <= 1:
        raise ValueError(f"{op}: least must be from 0 to 1, got {least}")
    if not isinstance(errors, bool):
        raise TypeError(f"{op}: errors must be True or False, got {type(errors).__name__}")
    top = graph.target_node(target)
    weight = float(graph.targets.weights[target])
    path = strongest_path(graph, target)
    tree = _Tree(graph, branches, least, errors, group, path)
    root = tree.grow(top, depth, max_lines)
    out = [Line(f"{name(graph, [top])}  {weight:.3f}", "target"), *tree.lines_below(root, "")]
    return out if path is None else [*out, *tree.path_lines(path)]


class _Tree:
    def __init__(
        self, graph: Graph, branches: int, least: float, errors: bool, group: Grouping, path: Path | None
    ) -> None:
        self.graph, self.branches, self.least, self.errors = graph, branches, least, errors
        self.units = units("tree", graph, group)
        steps = [] if path is None else self.units.unit[list(path.nodes)].tolist()
        self.links = set(itertools.pairwise(steps))
        self.row = {node: r for r, node in enumerate(graph.row_node.tolist())}
        self.unfolded: dict[int, _Branch] = {}
        self.printed: set[int] = set()

    def grow(self, top: int, depth: int, max_lines: int) -> _Branch:
        """Unfold the most important line with inputs, again and again, until the tree is as deep or long as allowed."""
        root = _Branch(_Input(top, 1.0, 1.0), 0, 1.0)
        waiting = [(-1.0, 0, root)]
        count, number = 1, itertools.count(1)
        while waiting and count < max_lines:
            branch = heapq.heappop(waiting)[2]
            if branch.input.unit in self.unfolded:
                continue
            inputs = self._inputs(branch.input.unit, self.errors or branch is root)[: max_lines - count]
            self.unfolded[branch.input.unit] = branch
            for step in inputs:
                below = _Branch(step, branch.depth + 1, branch.importance * step.share)
                branch.inputs.append(below)
                if below.depth < depth and any(node in self.row for node in self.units.nodes(step.unit)):
                    heapq.heappush(waiting, (-below.importance, next(number), below))
            count += len(inputs)
        return root

    def _inputs(self, unit: int, errors: bool) -> list[_Input]:
        """Strongest inputs of a unit, and the sum of all errors behind them."""
        graph = self.graph
        rows = [graph.rows.row(self.row[node]) for node in self.units.nodes(unit) if node in self.row]
        if not rows:
            return []
        source = self.units.unit[np.concatenate([columns.numpy() for columns, _ in rows])]
        weight = np.concatenate([weights.double().numpy() for _, weights in rows]) * (source != unit)
        mass = float(np.abs(weight).sum())
        if mass == 0:
            return []
        net = np.bincount(source, weight, minlength=graph.nodes)
        error = float(net[graph.first_error : graph.first_token].sum())
        error_mass = float(np.abs(weight[(source >= graph.first_error) & (source < graph.first_token)]).sum())
        net[graph.first_error : graph.first_token] = 0
        size = np.abs(net)
        cutoff = max(self.least * float(size.max()), float(np.finfo(np.float64).tiny))
        strong = np.flatnonzero(size >= cutoff)
        strong = strong[np.argsort(-size[strong], kind="stable")][: self.branches]
        out = [_Input(i, float(net[i]), float(size[i]) / mass) for i in strong.tolist()]
        return [*out, _Input(-1, error, error_mass / mass)] if errors and error_mass > 0 else out

    def lines_below(self, branch: _Branch, indent: str) -> list[Line]:
        """Lines of a branch's inputs."""
        out: list[Line] = []
        self.printed.add(branch.input.unit)
        for below in branch.inputs:
            last = below is branch.inputs[-1]
            marked = (below.input.unit, branch.input.unit) in self.links
            text = f"{indent}{'└─' if last else '├─'} {self._figures(below.input)}{self._reference(below)}"
            out.append(Line(text + ("  ◀" if marked else ""), "path" if marked else self._style(below.input.unit)))
            out += self.lines_below(below, indent + ("   " if last else "│  ")) if below.inputs else []
        return out

    def _figures(self, step: _Input) -> str:
        text = "errors"
        if step.unit >= 0:
            text = name(self.graph, self.units.nodes(step.unit), self.units.names.get(step.unit))
        return f"{step.weight:+8.3g} {percent(step.share):>6}  {text}"

    def _style(self, unit: int) -> str:
        return "error" if unit < 0 else "node" if unit < self.graph.first_token else "token"

    def _reference(self, branch: _Branch) -> str:
        """Say where a unit is unfolded, if not below this line, or that nothing of it was traced."""
        unit = branch.input.unit
        if branch.inputs or not 0 <= unit < self.graph.first_error:
            return ""
        if unit in self.unfolded and self.unfolded[unit].inputs:
            return " (above)" if unit in self.printed else " (below)"
        return "" if any(node in self.row for node in self.units.nodes(unit)) else " (no row)"

    def path_lines(self, path: Path) -> list[Line]:
        """A line for every node of the strongest path, with its edge from the node before."""
        out = [Line(f"strongest path, at least {percent(min(self._shares(path)))} at every step", "path")]
        figures = ["", *(f"{w:+8.3g} {percent(s):>6}" for w, s in zip(path.weights, self._shares(path), strict=True))]
        for node, figure in zip(path.nodes, figures, strict=True):
            out.append(Line(f"   {figure:15}  {name(self.graph, [node])}", "path"))
        return out

    def _shares(self, path: Path) -> list[float]:
        """Share of each edge of a path in the row of its target."""
        masses = (float(self.graph.rows.row(self.row[node])[1].double().abs().sum()) for node in path.nodes[1:])
        return [abs(weight) / mass for weight, mass in zip(path.weights, masses, strict=True)]
