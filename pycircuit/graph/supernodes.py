"""Features that a reader takes as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .graph import Graph
    from .prune import Pruned


class Supernode(NamedTuple):
    """nodes: ascending; name: their label, or the layer and number of the one feature they are."""

    name: str
    nodes: tuple[int, ...]


def supernodes(pruned: Pruned) -> list[Supernode]:
    """Groups of two and more, the most influential first."""
    graph, influence = pruned.whole, pruned.influence
    groups: dict[tuple[str, int], list[int]] = {}
    for node in pruned.node_mask[: graph.first_error].nonzero()[:, 0].tolist():
        groups.setdefault(key(graph, node), []).append(node)
    found = [Supernode(name, tuple(nodes)) for (name, _), nodes in groups.items() if len(nodes) > 1]
    return sorted(found, key=lambda group: -float(influence[list(group.nodes)].sum()))


def key(graph: Graph, node: int) -> tuple[str, int]:
    """Label and position of a group; for a feature without a label its own name, at all positions."""
    layer, position, feature = graph.features[node].tolist()
    label = graph.labels.get((layer, feature))
    return (label, position) if label else (f"L{layer}/{feature}", -1)
