"""Supernodes: groups of features that read as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .graph import Graph
    from .prune import Pruned


class Supernode(NamedTuple):
    """A group of nodes. name: their label, or the layer and index of their feature; nodes: ascending."""

    name: str
    nodes: tuple[int, ...]


def supernodes(pruned: Pruned) -> list[Supernode]:
    """Supernodes of two or more nodes, the most influential first."""
    graph, influence = pruned.original, pruned.influence
    groups: dict[tuple[str, int], list[int]] = {}
    for node in pruned.node_mask[: graph.first_error].nonzero()[:, 0].tolist():
        groups.setdefault(key(graph, node), []).append(node)
    result = [Supernode(name, tuple(nodes)) for (name, _), nodes in groups.items() if len(nodes) > 1]
    return sorted(result, key=lambda group: -float(influence[list(group.nodes)].sum()))


def key(graph: Graph, node: int) -> tuple[str, int]:
    """Key of a feature's group: its label and position; for a feature without a label its own name and -1."""
    layer, position, feature = graph.features[node].tolist()
    label = graph.labels.get((layer, feature))
    return (label, position) if label else (f"L{layer}/{feature}", -1)
