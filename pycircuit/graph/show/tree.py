"""Tree of a graph as indented text: a target, its strongest inputs, and theirs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pycircuit.ops import checks

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph
    from pycircuit.graph.paths import Path

_NAME_WIDTH = 32  # of a name


class Line(NamedTuple):
    """A line of the tree. style: target, path (on the strongest path), node, token or error."""

    text: str
    style: str


def strongest(graph: Graph, target: int) -> Path | None:
    """The strongest path from any token to a target; the first position counts only if it is the only one."""
    node = graph.target_node(target)
    tokens = range(min(1, graph.positions - 1), int(graph.targets.positions[target]) + 1)
    paths = [path for p in tokens for path in graph.paths(graph.token_node(p), node)]
    return max(paths, key=lambda path: path.strength, default=None)


def name(graph: Graph, node: int) -> str:
    """Name a node: `Texas @Dallas`, `L3/412 @Dallas`, a token's text in quotes, a target's label."""
    description = graph.describe(node)
    if description["kind"] == "target":
        return plain(description["label"])
    token = plain(graph.tokens.text[description["position"]])
    if description["kind"] == "token":
        return f"“{token}”"
    if "feature" not in description:
        return f"error @{token}"
    label = description.get("label") or f"L{description['layer']}/{description['feature']}"
    return f"{plain(label)} @{token}"


def plain(text: str) -> str:
    """Replace control characters, so that the text is on one line."""
    return "".join(c if c.isprintable() else "·" for c in text.strip(" ")) or "␣"


def lines(graph: Graph, target: int, depth: int, branches: int, least: float) -> list[Line]:
    """Lines of the tree of a target's inputs."""
    op = "tree"
    checks.whole(op, "depth", depth, 1)
    checks.whole(op, "branches", branches, 1)
    if not 0 <= checks.number(op, "least", least) <= 1:
        raise ValueError(f"{op}: least must be from 0 to 1, got {least}")
    top = graph.target_node(target)
    weight = float(graph.targets.weights[target])
    path = strongest(graph, target)
    tree = _Tree(graph, branches, least, () if path is None else path.nodes)
    out = [Line(f"{name(graph, top)}  {weight:.3f}", "target")]
    return out + tree.lines_below(top, "", depth)


class _Tree:
    def __init__(self, graph: Graph, branches: int, least: float, path: Sequence[int]) -> None:
        self.graph, self.branches, self.least = graph, branches, least
        self.path, self.links = set(path), set(itertools.pairwise(path))
        self.row = {node: r for r, node in enumerate(graph.row_node.tolist())}
        self.shown: set[int] = set()

    def lines_below(self, node: int, indent: str, depth: int) -> list[Line]:
        """Lines of a node's inputs; below the depth those of the path alone."""
        if node not in self.row or (depth <= 0 and node not in self.path):
            return []
        chosen, errors = self._inputs(node, depth > 0)
        out: list[Line] = []
        for index, (source, weight, share) in enumerate(chosen):
            last = index == len(chosen) - 1 and errors is None
            marked = (source, node) in self.links
            reference = self._reference(source, marked)
            text = (
                f"{indent}{'└─' if last else '├─'} {weight:+7.2f} {100 * share:3.0f}%  {self._name(source)}{reference}"
            )
            token = source >= self.graph.first_token
            style = "path" if marked else "token" if token else "node"
            out.append(Line(text + ("  ◀" if marked else ""), style))
            if not reference:
                if depth > 1:
                    self.shown.add(source)
                out += self.lines_below(source, indent + ("   " if last else "│  "), depth - 1)
        if errors is not None:
            out.append(Line(f"{indent}└─ {errors[0]:+7.2f} {100 * errors[1]:3.0f}%  errors", "error"))
        return out

    def _reference(self, source: int, marked: bool) -> str:
        """Reference to the line that unfolds a node, or "": nodes of the path are unfolded on the path alone."""
        if marked or source not in self.row:
            return ""
        return " (see ◀)" if source in self.path else " (above)" if source in self.shown else ""

    def _name(self, node: int) -> str:
        text = name(self.graph, node)
        return text if len(text) <= _NAME_WIDTH else text[: _NAME_WIDTH - 1] + "…"

    def _inputs(self, node: int, unfold: bool) -> tuple[list[tuple[int, float, float]], tuple[float, float] | None]:
        """Strongest inputs and the one on the path: (node, weight, share of the row); sum of all errors.

        unfold: False for the input on the path alone.
        """
        graph = self.graph
        columns, weights = graph.rows.row(self.row[node])
        size = weights.double().abs()
        mass = float(size.sum())
        if mass == 0:
            return [], None
        share = size / mass
        is_error = (columns >= graph.first_error) & (columns < graph.first_token)
        order = [i for i in share.argsort(descending=True, stable=True).tolist() if not is_error[i]]
        shown = [i for i in order[: self.branches] if share[i] >= self.least] if unfold else []
        shown += [i for i in order if (int(columns[i]), node) in self.links and i not in shown]
        chosen = [(int(columns[i]), float(weights[i]), float(share[i])) for i in shown]
        error_share = float(share[is_error].sum())
        errors = (
            (float(weights[is_error].sum()), error_share) if unfold and error_share >= max(self.least, 1e-12) else None
        )
        return chosen, errors
