"""Invariants of every graph, checked once when it is made, so that no later code needs to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pycircuit.ops import checks

from .csr import STEP, Rows

if TYPE_CHECKING:
    from .endpoints import Targets, Tokens
    from .graph import Graph

_OP = "Graph"


def validate(graph: Graph) -> dict[str, Any]:
    """The graph's fields as CPU tensors in their own types; ValueError or TypeError for an invalid graph."""
    layers = checks.whole_number(_OP, "layers", graph.layers, 0)
    vocab_size = checks.whole_number(_OP, "vocab_size", graph.vocab_size, 0)
    tokens, targets = _tokens(graph.tokens), _targets(graph.targets)
    within("targets.positions", targets.positions, 0, len(tokens.text))
    features = _features(graph.features, layers, len(tokens.text))
    values = _floats("values", graph.values, len(features))
    if not isinstance(graph.rows, Rows):
        raise TypeError(f"{_OP}: rows must be Rows, got {type(graph.rows).__name__}")
    first_target = len(features) + (layers + 1) * len(tokens.text)
    row_node = _row_node(graph, len(features), first_target, first_target + len(targets))
    if not graph.rows.known_finite():
        _finite("rows.weight", graph.rows.weight)
    _downward(graph.rows, row_node, features, first_target)
    _text("prompt", graph.prompt)
    _json("timings", graph.timings)
    _json("provenance", graph.provenance)
    _probabilities(graph.provenance.get("probabilities", {}))
    _labels("labels", graph.labels)
    _labels("automatic_labels", graph.automatic_labels)
    return {
        "features": features, "values": values, "row_node": row_node, "tokens": tokens, "targets": targets,
        "layers": layers, "vocab_size": vocab_size, **_sums(graph),
    }  # fmt: skip


def _probabilities(known: Any) -> None:
    """Raise unless these are probabilities by name."""
    if not isinstance(known, dict) or not all(type(p) is float and 0 <= p <= 1 for p in known.values()):
        raise ValueError(f"{_OP}: provenance's probabilities must be numbers from 0 to 1 by token, got {known!r:.80}")


def _labels(name: str, labels: Any) -> None:
    if not isinstance(labels, dict):
        raise TypeError(f"{_OP}: {name} must be a dict, got {type(labels).__name__}")
    for key, text in labels.items():
        if not isinstance(key, tuple) or len(key) != 2 or not all(type(n) is int for n in key):
            raise TypeError(f"{_OP}: {name} must be by (layer, feature), got {key!r}")
        if not isinstance(text, str):
            raise TypeError(f"{_OP}: {name}[{key}] must be a string, got {type(text).__name__}")


def within(name: str, t: Tensor, low: int, high: int) -> None:
    """Raise unless all elements are from low to below high."""
    checks.bounded(_OP, name, t, low, high, f"from {low} to below {high}")


def _sums(graph: Graph) -> dict[str, Tensor]:
    """Fields with one number a row, in float64."""
    count = graph.rows.count
    sums = {name: _floats(name, getattr(graph, name), count).double() for name in ("bias", "preactivation")}
    for name in ("dropped", "dropped_mass", "product_norm"):
        tensor = getattr(graph, name)
        sums[name] = graph.bias.new_zeros(count).double() if tensor is None else _floats(name, tensor, count).double()
    for name in ("dropped_mass", "product_norm"):
        if count and sums[name].min() < 0:
            raise ValueError(f"{_OP}: {name} must not be negative, got {float(sums[name].min())}")
    return sums


def _finite(name: str, t: Tensor) -> None:
    array = t.numpy()
    for begin in range(0, len(array), STEP):
        good = np.isfinite(array[begin : begin + STEP])
        if not good.all():
            index = begin + int(good.argmin())
            raise ValueError(f"{_OP}: {name} must be finite, got {float(t[index])} at {index}")


def _floats(name: str, value: Any, count: int) -> Tensor:
    t = checks.floats(_OP, name, value, (1,), checks.WIDE).cpu().contiguous()
    checks.shaped(_OP, name, t, (count,), "one for each")
    _finite(name, t)
    return t


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{_OP}: {name} must be a string, got {type(value).__name__}")


def _texts(name: str, values: Any) -> list[str]:
    if isinstance(values, str):
        raise TypeError(f"{_OP}: {name} must be a list of strings, got one string")
    for i, value in enumerate(values):
        _text(f"{name}[{i}]", value)
    return list(values)


def _json(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{_OP}: {name} must be a dict, got {type(value).__name__}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{_OP}: {name} must hold only what JSON can: {error}") from None


def _tokens(tokens: Tokens) -> Tokens:
    text = _texts("tokens.text", tokens.text)
    ids = checks.integers(_OP, "tokens.ids", tokens.ids).cpu()
    checks.shaped(_OP, "tokens.ids", ids, (len(text),), "one for each of tokens.text")
    within("tokens.ids", ids, 0, 2**62)
    return type(tokens)(ids, text)


def _targets(targets: Targets) -> Targets:
    labels = _texts("targets.labels", targets.labels)
    ids = checks.integers(_OP, "targets.ids", targets.ids).cpu()
    positions = checks.integers(_OP, "targets.positions", targets.positions).cpu()
    weights = _floats("targets.weights", targets.weights, len(labels)).double()
    checks.shares(_OP, "targets.weights", weights)
    for name, t in (("targets.ids", ids), ("targets.positions", positions)):
        checks.shaped(_OP, name, t, (len(labels),), "one for each of targets.labels")
    within("targets.ids", ids, -1, 2**62)
    return type(targets)(labels, ids, weights, positions)


def _features(value: Any, layers: int, positions: int) -> Tensor:
    t = checks.tensor(_OP, "features", value)
    checks.of_type(_OP, "features", t, (torch.int64,))
    checks.dimensions(_OP, "features", t, (2,))
    checks.shaped(_OP, "features", t, (len(t), 3), "layer, position, feature of each")
    t = t.cpu().contiguous()
    for column, (name, high) in enumerate((("layer", layers), ("position", positions), ("feature", 2**40))):
        within(f"features' {name}", t[:, column], 0, high)
    ordered = t.numpy()
    if not _lexicographic(ordered):
        ordered = ordered[np.lexsort(ordered.T[::-1])]
        repeated = (ordered[1:] == ordered[:-1]).all(1)
        if repeated.any():
            raise ValueError(f"{_OP}: features must be distinct, got {ordered[1:][repeated][0].tolist()} twice")
    return t


def _lexicographic(t: np.ndarray) -> bool:
    """True if every row of [n, 3] comes after the one before it."""
    greater = np.zeros(max(len(t) - 1, 0), bool)
    equal = np.ones(max(len(t) - 1, 0), bool)
    for column in t.T:
        greater |= equal & (column[1:] > column[:-1])
        equal &= column[1:] == column[:-1]
    return bool(greater.all())


def _row_node(graph: Graph, features: int, first_target: int, nodes: int) -> Tensor:
    row_node = checks.integers(_OP, "row_node", graph.row_node).cpu()
    checks.shaped(_OP, "row_node", row_node, (graph.rows.count,), "one for each row")
    node = row_node.numpy()
    wrong = ~(((node >= 0) & (node < features)) | ((node >= first_target) & (node < nodes)))
    if wrong.any():
        raise ValueError(
            f"{_OP}: row_node must be features (below {features}) or targets ({first_target} to below {nodes}), "
            f"got {int(node[wrong][0])}"
        )
    if len(np.unique(node)) != len(node):
        raise ValueError(f"{_OP}: row_node must name each node once, got {len(node) - len(np.unique(node))} twice")
    return row_node


def _downward(rows: Rows, row_node: Tensor, features: Tensor, sources: int) -> None:
    """Raise unless every edge comes from a source in a layer below the feature it enters: the graph has no cycle."""
    if rows.entries == 0:
        return
    starts, ends = rows.row_ptr.numpy()[:-1], rows.row_ptr.numpy()[1:]
    filled = ends > starts
    # Columns ascend in a row, so its first and last bound the others.
    within("rows.column", rows.column[torch.from_numpy(np.r_[starts[filled], ends[filled] - 1])], 0, sources)
    layer = np.concatenate([features[:, 0].numpy(), np.full(sources - len(features), -1)]).astype(np.int32)
    node = row_node.numpy()
    limit = np.full(rows.count, np.iinfo(np.int32).max, dtype=np.int32)
    limit[node < len(features)] = layer[node[node < len(features)]]
    highest = _highest(rows, layer, len(features))
    if (highest >= limit).any():
        r = int((highest >= limit).argmax())
        raise ValueError(
            f"{_OP}: rows must hold edges from lower layers only, got one from layer {highest[r]} in row {r}, "
            f"which explains a feature of layer {limit[r]}"
        )


def _highest(rows: Rows, layer: np.ndarray, features: int) -> np.ndarray:
    """The highest layer of a feature among each row's columns, or -1: [rows]."""
    out = np.full(rows.count, -1, dtype=np.int32)
    column = rows.column.numpy()
    if (np.diff(layer[:features]) >= 0).all():
        # Features are in the order of layers: the highest layer is that of the row's last feature.
        starts = rows.row_ptr.numpy()[:-1]
        last = _first_at_least(column, starts, rows.row_ptr.numpy()[1:], features) - 1
        has_feature = last >= starts
        out[has_feature] = layer[column[last[has_feature]]]
        return out
    for block in rows.blocks():
        out[block.rows] = block.reduce(np.maximum, layer.take(block.gather(column)))
    return out


def _first_at_least(column: np.ndarray, low: np.ndarray, high: np.ndarray, value: int) -> np.ndarray:
    """Index of the first column >= value in each row [low, high) of ascending columns, or high: [rows]."""
    while (unfinished := low < high).any():
        middle = np.where(unfinished, (low + high) // 2, 0)
        below = unfinished & (column[middle] < value)
        low, high = np.where(below, middle + 1, low), np.where(unfinished & ~below, middle, high)
    return low
