"""Effects of groups of features: those that a graph predicts beside those of its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pycircuit.graph import Graph, Supernode
from pycircuit.graph.csr import index_below
from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import checks

from .graph_effects import (
    OP,
    RowReader,
    edges_of,
    require_same_features,
    require_same_model,
    through_features,
)
from .intervention import Freeze, Frozen, Intervention
from .intervention_run import BATCH_POSITIONS, BaselineRun, InterventionRun, run_baseline
from .steering import Placed, Steering, changes_by_layer

NodeGroup = Supernode | Sequence[int]


@dataclass(frozen=True, eq=False)
class GroupEffects:
    """Predicted and measured changes of nodes when a group of features is multiplied by a factor.

    freeze: see pc.intervene; nodes: [n], targets and the groups' features; predicted, measured: [groups, factors, n]
    float64, changes of logits and pre-activations; NaN where a node is in the group or not above it, or its change was
    not finite.
    """

    groups: tuple[Supernode, ...]
    factors: tuple[float, ...]
    freeze: Freeze
    nodes: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray

    def pairs(self, group: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(predicted, measured) effects of a group, or of all, that are known: [pairs] each."""
        chosen = slice(None) if group is None else index_below("GroupEffects", "group", group, len(self.groups))
        predicted, measured = self.predicted[chosen].ravel(), self.measured[chosen].ravel()
        known = np.isfinite(predicted) & np.isfinite(measured)
        return predicted[known], measured[known]

    @property
    def correlation(self) -> float:
        """Pearson's correlation of predicted and measured effects; NaN where it is undefined."""
        return _correlation(*self.pairs())

    @property
    def slope(self) -> float:
        """Measured effect for each unit of predicted effect: the least-squares line through zero."""
        predicted, measured = self.pairs()
        scale = float(predicted @ predicted)
        return float(predicted @ measured) / scale if scale > 0 else float("nan")

    @property
    def sign_agreement(self) -> float:
        """Share of the effects whose sign was predicted, of those where neither is zero."""
        predicted, measured = self.pairs()
        moved = (predicted != 0) & (measured != 0)
        return float((np.sign(predicted) == np.sign(measured))[moved].mean()) if moved.any() else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """Figures as plain values, for JSON."""
        each_group = []
        for i, group in enumerate(self.groups):
            pair = self.pairs(i)
            each_group.append({"name": group.name, "nodes": list(group.nodes), "correlation": _correlation(*pair)})
        totals = {"correlation": self.correlation, "slope": self.slope, "sign_agreement": self.sign_agreement}
        settings = {"freeze": self.freeze, "factors": list(self.factors), "pairs": len(self.pairs()[0])}
        return {**settings, **totals, "groups": each_group}

    def __repr__(self) -> str:
        return (
            f"GroupEffects(groups={len(self.groups)}, factors={self.factors}, freeze={self.freeze!r}, "
            f"pairs={len(self.pairs()[0])}, correlation={self.correlation:.3f}, slope={self.slope:.3f}, "
            f"sign_agreement={self.sign_agreement:.3f})"
        )


def _correlation(predicted: np.ndarray, measured: np.ndarray) -> float:
    if len(predicted) < 2:
        return float("nan")
    a, b = predicted - predicted.mean(), measured - measured.mean()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else float("nan")


def group_effects(
    model: ReplacementModel, graph: Graph, groups: Sequence[NodeGroup], factors: Sequence[float], freeze: Freeze
) -> GroupEffects:
    """Multiply the features of each group by each factor, together, and compare the graph with the model."""
    require_same_model(model, graph)
    named = _checked_groups(graph, groups)
    checked = tuple(checks.number(OP, "factors", factor) for factor in factors)
    if not checked or any(factor == 1 or not np.isfinite(factor) for factor in checked):
        raise ValueError(f"{OP}: factors must be finite numbers that change something, got {list(factors)}")
    frozen = Frozen.checked(OP, freeze, None, model.depth)
    rows = RowReader(model, graph)
    variants = [(group, factor) for group in named for factor in checked]
    with model.forward_lock:
        baseline = run_baseline(model, graph.tokens.ids.to(model.device), patterns=True)
        require_same_features(baseline, graph)
        measured = _measure(baseline, graph, variants, frozen, rows)
    predicted = _predict(graph, variants, freeze)
    compared = _compared_rows(graph, named) & rows.readable.numpy()
    known = _reached(graph, variants, rows)
    predicted[~known], measured[~known] = np.nan, np.nan
    measured[~np.isfinite(measured)] = np.nan
    shape = (len(named), len(checked), int(compared.sum()))
    effects = (values[compared].T.reshape(shape) for values in (predicted, measured))
    return GroupEffects(named, checked, freeze, graph.row_node.numpy()[compared], *effects)


def _checked_groups(graph: Graph, groups: Sequence[NodeGroup]) -> tuple[Supernode, ...]:
    """Groups with names, of features alone."""
    if not isinstance(groups, Sequence) or isinstance(groups, str) or not groups:
        raise ValueError(f"{OP}: groups must be a list of groups of nodes, got {groups!r}")
    result = []
    for i, group in enumerate(groups):
        name, nodes = group if isinstance(group, Supernode) else (f"group {i}", group)
        unique = sorted({index_below(OP, f"groups[{i}]", node, graph.nodes) for node in nodes})
        if not unique or unique[-1] >= graph.first_error:
            raise ValueError(f"{OP}: groups[{i}] must have features and nothing else, got {unique}")
        result.append(Supernode(name, tuple(unique)))
    return tuple(result)


Variant = tuple[Supernode, float]


def _predict(graph: Graph, variants: Sequence[Variant], freeze: Freeze) -> np.ndarray:
    """Changes of every row: edges where MLPs are frozen, else also the paths through features outside the group."""
    nodes = sorted({node for group, _ in variants for node in group.nodes})
    edges = edges_of(graph, nodes)
    column = {node: i for i, node in enumerate(nodes)}
    direct = np.stack([(f - 1) * edges[:, [column[n] for n in g.nodes]].sum(1) for g, f in variants], axis=1)
    if freeze == "all":
        return direct
    row_node = graph.row_node.numpy()
    changed = np.stack([np.isin(row_node, group.nodes) for group, _ in variants], axis=1)
    return through_features(graph, direct, changed, floor=True)


def _compared_rows(graph: Graph, groups: Sequence[Supernode]) -> np.ndarray:
    """Mask of the rows of targets and of the groups' features: [rows]."""
    row_node = graph.row_node.numpy()
    return np.isin(row_node, [node for group in groups for node in group.nodes]) | (row_node >= graph.first_target)


def _reached(graph: Graph, variants: Sequence[Variant], rows: RowReader) -> np.ndarray:
    """Mask of the rows that read above a group's lowest feature and are not in the group: [rows, variants]."""
    row_node, layer, feature_layer = graph.row_node.numpy(), rows.layer.numpy(), graph.features[:, 0].numpy()
    masks = [
        (layer > feature_layer[list(group.nodes)].min()) & ~np.isin(row_node, group.nodes) for group, _ in variants
    ]
    return np.stack(masks, axis=1)


def _measure(
    baseline: BaselineRun, graph: Graph, variants: Sequence[Variant], frozen: Frozen, rows: RowReader
) -> np.ndarray:
    """Changes of every row in the model: [rows, variants]."""
    model, features = baseline.model, graph.features.tolist()
    step = max(1, BATCH_POSITIONS // baseline.positions)
    out = np.zeros((graph.rows.count, len(variants)))
    for begin in range(0, len(variants), step):
        placed: list[Placed] = [
            (row, features[node][1], _scaled(features[node], factor))
            for row, (group, factor) in enumerate(variants[begin : begin + step])
            for node in group.nodes
        ]
        changes = changes_by_layer(placed, baseline.state.final)
        steering = Steering(model.transcoders, changes, baseline.original, frozen.layers, frozen.written)
        count = min(step, len(variants) - begin)
        states = InterventionRun(baseline, steering, frozen, count, min(changes)).run()
        for row, state in enumerate(states):
            out[:, begin + row] = rows.changes(state, baseline.state).numpy()
    return out


def _scaled(feature: list[int], factor: float) -> Intervention:
    layer, position, index = feature
    return Intervention(layer, position, index, factor=factor)
