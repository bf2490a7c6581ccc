"""Effects of features and supernodes of one graph: predicted by the graph, by the gradient, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from pycircuit.graph import Graph, Pruned, Supernode
from pycircuit.graph.supernodes import supernodes
from pycircuit.interventions.graph_effects import edges_of, through_features
from pycircuit.interventions.intervention import Freeze
from pycircuit.model import ReplacementModel

from .effect_meter import EffectMeter

SourceKind = Literal["feature", "supernode"]
FREEZES: tuple[Freeze, ...] = ("attention", "patterns", "none")
FACTORS = (0.0, 2.0)
SOURCES = 12  # features of a graph, and supernodes, that are changed at most
MOST_NODES = 256  # features of a circuit that are grouped, the most influential


@dataclass(frozen=True)
class Sources:
    """Features and supernodes of a circuit that are changed one by one."""

    features: list[Supernode]
    supernodes: list[Supernode]


def limited(pruned: Pruned, most: int) -> Pruned:
    """The most influential features of a pruned graph; errors, tokens and targets stay as they were."""
    mask = pruned.node_mask.clone()
    nodes = mask[: pruned.original.first_error].nonzero()[:, 0]
    if len(nodes) > most:
        order = pruned.influence[nodes].argsort(descending=True, stable=True)
        mask[nodes[order[most:]]] = False
    return replace(pruned, node_mask=mask)


def sources_of(pruned: Pruned, seed: int, count: int) -> Sources:
    """Draw features of the circuit at random, and return its most influential supernodes, by structure.

    A circuit with fewer features lends the most influential ones outside it.
    """
    circuit = limited(pruned, MOST_NODES)
    features = circuit.original.first_error
    nodes = circuit.node_mask[:features].nonzero()[:, 0].numpy()
    drawn = np.random.default_rng(seed).permutation(nodes)[:count]
    if len(drawn) < count:
        order = pruned.influence[:features].argsort(descending=True, stable=True).numpy()
        drawn = np.concatenate([drawn, order[~np.isin(order, drawn)][: count - len(drawn)]])
    singles = [Supernode(f"feature {node}", (int(node),)) for node in np.sort(drawn)]
    return Sources(singles, supernodes(circuit, "structure")[:count] if len(nodes) else [])


def effects(
    model: ReplacementModel,
    graph: Graph,
    sources: Sources,
    gradient: torch.Tensor,
    *,
    is_exact: bool = False,
    freezes: Sequence[Freeze] = FREEZES,
    factors: Sequence[float] = FACTORS,
) -> list[dict[str, Any]]:
    """Effects of every source under each freeze and factor, as plain values.

    gradient: gradient times activation of each feature, [features]. is_exact: features are neurons, which can fall
    below zero and need no replacement model. Each entry has `answer`, (measured, by graph, by gradient, by replacement
    model) of each source on the answer's centred logit, and `above`, (layers between, measured, by graph, by
    replacement model) on the other sources' features.
    """
    out: list[dict[str, Any]] = []
    meter, small = EffectMeter(model, graph), _between_rows(graph, [*sources.features, *sources.supernodes])
    kinds: dict[SourceKind, list[Supernode]] = {"feature": sources.features, "supernode": sources.supernodes}
    for kind, groups in kinds.items():
        if not groups:
            continue
        by_graph = [predicted_changes(*small(groups), factor, floor=not is_exact).T for factor in factors]
        slope = np.array([float(gradient[list(group.nodes)].sum()) for group in groups])
        rows = _compared_rows(graph, groups)
        for freeze in freezes:
            measured = meter.changes(groups, factors, freeze)
            replaced = np.full_like(measured, np.nan) if is_exact else meter.changes(groups, factors, freeze, True)
            for i, factor in enumerate(factors):
                by_gradient = (factor - 1) * slope
                columns = (measured[i, :, rows[0]], by_graph[i][:, rows[0]], by_gradient, replaced[i, :, rows[0]])
                out.append(
                    {
                        "kind": kind,
                        "freeze": freeze,
                        "factor": factor,
                        "answer": [_rounded(*values) for values in zip(*columns, strict=True)],
                        "above": _above(graph, groups, rows[1:], measured[i], by_graph[i], replaced[i]),
                    }
                )
    return out


def _between_rows(
    graph: Graph, groups: Sequence[Supernode]
) -> Callable[[Sequence[Supernode]], tuple[Graph, list[Supernode]]]:
    """The edges that predictions need, among features with rows and from the groups, and the groups' nodes there.

    Rows stay in their order. A graph of neurons has a hundred times as many edges.
    """
    mask = torch.ones(graph.nodes, dtype=torch.bool)
    mask[: graph.first_error] = False
    mask[graph.row_node] = True
    mask[[node for group in groups for node in group.nodes]] = True
    selected, number = graph.subgraph(mask), (mask.cumsum(0) - 1).tolist()

    def renumbered(chosen: Sequence[Supernode]) -> tuple[Graph, list[Supernode]]:
        return selected, [Supernode(group.name, tuple(number[node] for node in group.nodes)) for group in chosen]

    return renumbered


def _compared_rows(graph: Graph, groups: Sequence[Supernode]) -> np.ndarray:
    """The row of the answer, then those of the groups' features: [n]."""
    row_node = graph.row_node.numpy()
    (answer,) = np.flatnonzero(row_node >= graph.first_target)
    members = [node for group in groups for node in group.nodes]
    return np.concatenate([[answer], np.flatnonzero(np.isin(row_node, members))])


def predicted_changes(graph: Graph, groups: Sequence[Supernode], factor: float, floor: bool) -> np.ndarray:
    """Changes of every row that edges and paths through other features predict: [rows, groups]."""
    nodes = sorted({node for group in groups for node in group.nodes})
    member = np.array([[float(node in group.nodes) for group in groups] for node in nodes])
    direct = (factor - 1) * edges_of(graph, nodes) @ member
    row_node = graph.row_node.numpy()
    changed = np.stack([np.isin(row_node, group.nodes) for group in groups], axis=1)
    return through_features(graph, direct, changed, floor=floor)


def _above(
    graph: Graph, groups: Sequence[Supernode], rows: np.ndarray, *effects_of: np.ndarray
) -> list[list[float | None]]:
    """(layers between, measured, by graph, by replacement model) of effects on features above and outside the group.

    effects_of: [groups, all rows] each.
    """
    layers, node_of = graph.features[:, 0].numpy(), graph.row_node.numpy()
    out: list[list[float | None]] = []
    for i, group in enumerate(groups):
        distance = layers[node_of[rows]] - int(layers[list(group.nodes)].min())
        for row, between in zip(rows, distance.tolist(), strict=True):
            if between > 0 and int(node_of[row]) not in group.nodes:
                out.append([between, *_rounded(*(values[i, row] for values in effects_of))])
    return out


def _rounded(*values: float) -> list[float | None]:
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]
