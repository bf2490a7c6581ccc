"""Supernodes: groups of nodes that act as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from pycircuit.ops import checks

from . import influence
from .csr import STEP, index_below
from .grouping import structural_groups

if TYPE_CHECKING:
    from .graph import Graph
    from .prune import Pruned

OP = "Graph.supernodes"
Grouping = Literal["structure", "label"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
_TOKENS = 2  # in the name of a group without labels


class Supernode(NamedTuple):
    """A group of nodes. name: their label, or the tokens that they read; nodes: ascending."""

    name: str
    nodes: tuple[int, ...]


def supernodes(
    pruned: Pruned,
    method: Grouping = "structure",
    fixed: Mapping[str, Sequence[int]] | None = None,
    decoders: Any = None,
) -> list[Supernode]:
    """Fixed groups, and supernodes of two or more of the other features, the most influential first."""
    graph = pruned.original
    if method not in GROUPINGS:
        raise ValueError(f"{OP}: method must be one of {', '.join(GROUPINGS)}, got {method!r}")
    groups = [Supernode(name, tuple(nodes)) for name, nodes in _checked_groups(graph, fixed or {}).items()]
    vectors = _checked_decoders(graph, decoders)
    if vectors is not None and method != "structure":
        raise ValueError(f"{OP}: decoders must be None with method='label', got vectors; use method='structure'")
    taken = {node for group in groups for node in group.nodes}
    if method == "label":
        groups += _label_groups(pruned, taken)
    else:
        arrays = [np.array(group.nodes, np.int64) for group in groups]
        nodes, group_of = structural_groups(pruned, arrays, vectors)
        members = [nodes[group_of == g] for g in np.unique(group_of)]
        groups += _named(pruned, [m for m in members if len(m) > 1], {group.name for group in groups})
    mass = pruned.influence.numpy()
    return sorted(groups, key=lambda group: -float(mass[list(group.nodes)].sum()))


def _checked_groups(graph: Graph, fixed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Groups by name, whose nodes exist and belong to one group each."""
    if not isinstance(fixed, Mapping):
        raise TypeError(f"{OP}: fixed must be a dict from name to nodes, got {type(fixed).__name__}")
    result: dict[str, list[int]] = {}
    owner: dict[int, str] = {}
    for name, nodes in fixed.items():
        if not isinstance(name, str):
            raise TypeError(f"{OP}: fixed must have names that are strings, got {name!r}")
        result[name] = sorted({index_below(OP, f"fixed[{name!r}]", node, graph.nodes) for node in nodes})
        if not result[name]:
            raise ValueError(f"{OP}: fixed[{name!r}] must have a node, got none; leave the group out")
        for node in result[name]:
            if owner.setdefault(node, name) != name:
                raise ValueError(f"{OP}: fixed must name a node once, got {node} in {owner[node]!r} and {name!r}")
    return result


def _checked_decoders(graph: Graph, decoders: Any) -> np.ndarray | None:
    if decoders is None:
        return None
    t = checks.floats(OP, "decoders", decoders, (2,), checks.WIDE)
    if len(t) != graph.first_error:
        raise ValueError(f"{OP}: decoders must have a row for each of {graph.first_error} features, got {len(t)}")
    return t.detach().cpu().numpy()


# By label


def _label_groups(pruned: Pruned, taken: set[int]) -> list[Supernode]:
    """Features of one label at one position, or one feature without a label, where that makes two or more."""
    graph = pruned.original
    groups: dict[tuple[str, int], list[int]] = {}
    for node in pruned.node_mask[: graph.first_error].nonzero()[:, 0].tolist():
        if node not in taken:
            groups.setdefault(key(graph, node), []).append(node)
    return [Supernode(name, tuple(nodes)) for (name, _), nodes in groups.items() if len(nodes) > 1]


def key(graph: Graph, node: int) -> tuple[str, int]:
    """Key of a feature's group: its label and position; for a feature without a label its own name and -1."""
    layer, position, feature = graph.features[node].tolist()
    label = graph.labels.get((layer, feature))
    return (label, position) if label else (f"L{layer}/{feature}", -1)


# Names of structural groups


def _named(pruned: Pruned, members: list[np.ndarray], used: Iterable[str]) -> list[Supernode]:
    """Supernodes with different names: a label, the tokens read where no member has one, places if that is not all.

    A label is the one with the most influence among the members.
    """
    names = [_label(pruned, nodes) for nodes in members]
    if not all(names):
        shares = _shares_of_tokens(pruned.graph)
        index = pruned.node_mask.numpy().cumsum() - 1  # of features in the pruned graph
        graph = pruned.original
        names = [n or _token_name(graph, shares[index[m]].mean(0)) for n, m in zip(names, members, strict=True)]
    repeated = {name for name, count in Counter([*names, *used]).items() if count > 1}
    result, taken = [], set(used)
    for name, nodes in zip(names, members, strict=True):
        place = f"{name} at {_place(pruned.original, nodes)}" if name in repeated else name
        unique, number = place, 2
        while unique in taken:
            unique, number = f"{place} ({number})", number + 1
        taken.add(unique)
        result.append(Supernode(unique, tuple(nodes.tolist())))
    return result


def _label(pruned: Pruned, nodes: np.ndarray) -> str:
    votes: dict[str, float] = {}
    for node in nodes.tolist():
        label = pruned.original.describe(node).get("label")
        if label:
            votes[label] = votes.get(label, 0.0) + float(pruned.influence[node])
    return max(votes, key=lambda label: votes[label], default="")


def _shares_of_tokens(graph: Graph) -> np.ndarray:
    """Share of each node's input that comes from each token, along all paths: [nodes, positions]."""
    shares = np.zeros((graph.nodes, graph.positions))
    shares[graph.first_token : graph.first_target] = np.eye(graph.positions)
    node, column, weight = graph.row_node.numpy(), graph.rows.column.numpy(), graph.rows.weight.numpy()
    scale = influence.scales(graph.rows)
    for group in reversed(influence.layer_groups(graph)):
        for block in graph.rows.blocks(group, max(1, (STEP << 4) // graph.positions)):
            passed = np.abs(block.gather(weight)) * block.repeat(scale[block.rows])
            shares[node[block.rows]] = block.reduce(np.add, passed[:, None] * shares[block.gather(column)])
    return shares


def _token_name(graph: Graph, share: np.ndarray) -> str:
    """Name after the tokens that a group reads. share: of each token, [positions]."""
    strongest = np.argsort(-share, kind="stable")[:_TOKENS]
    texts = [graph.tokens.text[p] for p in sorted(strongest.tolist()) if share[p] > share.max() / 3]
    return "reads " + ", ".join(dict.fromkeys(text.strip() or repr(text) for text in texts)) if texts else "no token"


def _place(graph: Graph, nodes: np.ndarray) -> str:
    layer, position = (_span(graph.features[nodes, column].tolist()) for column in (0, 1))
    return f"{position}, layer{'s' * (' ' in layer)} {layer}"


def _span(numbers: list[int]) -> str:
    first, last = min(numbers), max(numbers)
    return f"{first}" if first == last else f"{first} to {last}"
