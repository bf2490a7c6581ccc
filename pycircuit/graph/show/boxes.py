"""Boxes of a picture: the nodes that are drawn, in the columns that fit, and the edges between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pycircuit.graph.identifiers import identifier

from .layout import ERRORS, TOKENS, WIDEST, Box, Layout, lay_out, shorten
from .node_names import AUTOMATIC, Grouping, label, name, plain, units

if TYPE_CHECKING:
    from pycircuit.graph.prune import Pruned

_TALL = 800  # pixels
_LABEL_WIDTHS = (150, 110, 80, 56)  # pixels, tried in turn until the picture is narrow enough
_MOST_COLUMNS = 20
_ALL_COLUMNS = 12  # positions of a prompt whose columns are all drawn
_FAINT, _MOST_INPUTS = 0.1, 6  # of a box: weight of an input relative to the strongest, and number, that are drawn
_SHOWN = 12  # nodes, or tokens of a gap, that a title names


def choose(pruned: Pruned, limit: int, path: Sequence[int], group: Grouping, errors: bool) -> tuple[list[Box], int]:
    """(boxes of the path, the most influential others and what stands at their ends; number of features that qualify).

    limit: boxes of features, those of the path aside.
    """
    graph, influence = pruned.original, pruned.influence.numpy()
    all_units = units("plot", graph, group)
    unit = all_units.unit
    features = pruned.node_mask.numpy()[: graph.first_error].copy()
    features[[node for node in path if node < graph.first_error]] = True
    nodes = features.nonzero()[0]
    total = np.bincount(unit[nodes], influence[nodes], minlength=graph.nodes)
    candidates = np.unique(unit[nodes])
    candidates = candidates[np.argsort(-total[candidates], kind="stable")]
    on_path = set(unit[list(path)].tolist())
    ordered = sorted(candidates.tolist(), key=lambda u: u not in on_path)
    chosen = ordered[: max(limit, sum(u in on_path for u in ordered))]
    members: dict[int, list[int]] = {u: [] for u in chosen}
    for node in nodes[np.isin(unit[nodes], chosen)].tolist():
        members[int(unit[node])].append(node)
    boxes = [_box(pruned, nodes, all_units.names.get(u)) for u, nodes in members.items()]
    boxes += [_box(pruned, nodes) for nodes in (_errors_by_column(pruned) if errors else [])]
    boxes += [_box(pruned, [node]) for node in range(graph.first_token, graph.nodes)]
    _edges(pruned, boxes, path)
    return _connected(boxes, set(path)), len(candidates)


def _errors_by_column(pruned: Pruned) -> list[list[int]]:
    graph = pruned.original
    error = pruned.node_mask.numpy()[graph.first_error : graph.first_token].nonzero()[0]
    columns: dict[int, list[int]] = {}
    for index in error.tolist():
        columns.setdefault(index % graph.positions, []).append(graph.first_error + index)
    return list(columns.values())


def _box(pruned: Pruned, nodes: list[int], group_name: str | None = None) -> Box:
    graph = pruned.original
    first = graph.describe(nodes[0])
    kind, influence = first["kind"], float(pruned.influence[nodes].sum())
    text = label(graph, nodes[0]) if group_name is None else plain(group_name)
    row = {"token": TOKENS, "error": ERRORS, "target": graph.layers}.get(kind, first.get("layer", 0))
    names = [name(graph, [node]) for node in nodes[:_SHOWN]]
    if len(nodes) > _SHOWN:
        names.append(f"and {len(nodes) - _SHOWN} more")
    if kind == "target":
        influence = first["weight"]
    elif kind == "error":
        text = "errors"
    elif kind == "feature":
        row = int(graph.features[nodes, 0].min())
        names += [f"activation {first['value']:.3g}"] * (len(nodes) == 1)
        text = text or identifier(graph, nodes[0])
    title = "\n".join([*names, f"influence {influence:.3g}"])
    box = Box(nodes, kind, text.removeprefix(AUTOMATIC), title, row, first["position"], influence)
    box.automatic = text.startswith(AUTOMATIC) and kind == "feature" and group_name is None
    return box


def _edges(pruned: Pruned, boxes: list[Box], path: Sequence[int]) -> None:
    """Set the weights from box to box: sums over the pruned edges between their nodes and the edges of the path."""
    graph = pruned.original
    box_of = np.full(graph.nodes, -1)
    for index, box in enumerate(boxes):
        box_of[box.nodes] = index
    row = {node: r for r, node in enumerate(graph.row_node.tolist())}
    starts, mask = graph.rows.row_ptr.tolist(), pruned.edge_mask.numpy()
    before = dict(zip(path[1:], path[:-1], strict=True))
    for index, box in enumerate(boxes):
        net = np.zeros(len(boxes) + 1)  # the last for nodes that are not drawn
        for r in (row[node] for node in box.nodes if node in row):
            columns, weights = (t.numpy() for t in graph.rows.row(r))
            drawn = mask[starts[r] : starts[r + 1]]
            if (source := before.get(int(graph.row_node[r]))) is not None:
                drawn = drawn | (columns == source)
            net += np.bincount(box_of[columns[drawn]] % len(net), weights[drawn], minlength=len(net))
        net[[index, -1]] = 0
        box.inputs = {int(i): float(net[i]) for i in net.nonzero()[0]}
        _leave_out_faint(box, {int(box_of[before[n]]) for n in box.nodes if n in before})


def _leave_out_faint(box: Box, path: set[int]) -> None:
    """Remove inputs that are next to nothing beside the strongest; those on the path stay."""
    sizes = sorted(map(abs, box.inputs.values()), reverse=True)
    cutoff = max([0.0, *(_FAINT * size for size in sizes[:1]), *sizes[_MOST_INPUTS - 1 : _MOST_INPUTS]])
    box.inputs = {source: w for source, w in box.inputs.items() if abs(w) >= cutoff or source in path}


def _connected(boxes: list[Box], path: set[int]) -> list[Box]:
    """Remove features and errors that feed nothing drawn, until none is left; those of the path stay."""
    while True:
        feeding = {source for box in boxes for source in box.inputs}
        remaining = [
            box
            for index, box in enumerate(boxes)
            if box.kind in ("token", "target") or index in feeding or not path.isdisjoint(box.nodes)
        ]
        if len(remaining) == len(boxes):
            return boxes
        boxes = _selected(boxes, remaining)


def _selected(boxes: Sequence[Box], remaining: list[Box]) -> list[Box]:
    """These boxes alone, with the inputs between them."""
    new = {id(box): i for i, box in enumerate(remaining)}
    number = [new.get(id(box)) for box in boxes]
    for box in remaining:
        box.inputs = {i: w for source, w in box.inputs.items() if (i := number[source]) is not None}
    return remaining


def fit(boxes: list[Box], path: set[int], tokens: Sequence[str]) -> tuple[list[Box], Layout]:
    """Boxes in the columns that fit into a picture, with gaps for the others, and their layout."""
    boxes = _busy_columns(boxes, len(tokens))
    for box in boxes:
        box.full_text = box.text
    while True:
        columns = {box.column for box in boxes}
        if len(columns) <= _MOST_COLUMNS:
            drawn, layout = _shortened(boxes, tokens)
            if layout.width <= WIDEST or len(columns) == 1:
                return drawn, layout
        least = _least_column(boxes, path)
        boxes = _selected(boxes, [box for box in boxes if box.column != least])


def _shortened(boxes: list[Box], tokens: Sequence[str]) -> tuple[list[Box], Layout]:
    """(boxes and gaps, their layout with the longest labels that fit)."""
    drawn = [*boxes, *_gaps({box.column for box in boxes}, tokens)]
    for limit in _LABEL_WIDTHS:
        for box in boxes:
            box.text = shorten(box.full_text, box.size, limit) + _suffix(box)
        widest = limit + 20
        layout = lay_out(drawn, widest)
        if layout.width <= WIDEST:
            break
    for beside in (2, 3, 4):  # labels, while a picture is tall and there is room
        if layout.height <= _TALL or (wider := lay_out(drawn, beside * (limit + 20))).width > WIDEST:
            break
        layout, widest = wider, beside * (limit + 20)
    return drawn, lay_out(drawn, widest)


def _suffix(box: Box) -> str:
    if box.kind == "target":
        return f" {100 * box.influence:.0f}%"
    return f" ×{len(box.nodes)}" if len(box.nodes) > 1 else ""


def _busy_columns(boxes: list[Box], positions: int) -> list[Box]:
    """Boxes without the columns of tokens that feed nothing, in a prompt of more than a few tokens."""
    if positions <= _ALL_COLUMNS:
        return boxes
    feeding = {source for box in boxes for source in box.inputs}
    busy = {box.column for i, box in enumerate(boxes) if box.kind != "token" or i in feeding}
    return _selected(boxes, [box for box in boxes if box.column in busy])


def _least_column(boxes: Iterable[Box], path: set[int]) -> int:
    """The column of least influence; the target's goes last, and those of the path before it."""
    rank: dict[int, tuple[bool, bool, float]] = {}
    for box in boxes:
        target, on_path, influence = rank.get(box.column, (False, False, 0.0))
        rank[box.column] = (
            target or box.kind == "target",
            on_path or not path.isdisjoint(box.nodes),
            influence + box.influence,
        )
    return min(rank, key=lambda column: rank[column])


def _gaps(columns: set[int], tokens: Sequence[str]) -> list[Box]:
    """A mark for every run of columns that are not drawn, with their tokens as its title."""
    absent = [column for column in range(len(tokens)) if column not in columns]
    runs: dict[int, list[int]] = {}
    key: Callable[[tuple[int, int]], int] = lambda pair: pair[1] - pair[0]  # noqa: E731
    for _, run in itertools.groupby(enumerate(absent), key=key):
        positions = [column for _, column in run]
        runs[positions[0]] = positions
    boxes = []
    for first, positions in runs.items():
        shown = [plain(tokens[p]) for p in positions[:_SHOWN]]
        more = f" and {len(positions) - _SHOWN} more" if len(positions) > _SHOWN else ""
        title = f"tokens {first} to {positions[-1]} are not drawn: {' '.join(shown)}{more}"
        boxes.append(Box([], "gap", "⋯", title, TOKENS, first, 0.0))
    return boxes
