"""Tokens of a prompt that features are most active on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pycircuit.graph import Graph

_SHARE = 0.5  # of a feature's largest activation, which a token must have to be named beside the first
_MOST, _FEWEST = 2 / 3, 8  # share of the positions that are most tokens, and the length from which on it says something


def active_positions(graph: Graph) -> Iterator[tuple[tuple[int, int], list[int], bool]]:
    """Yield ((layer, feature), its positions from the most active down, True if it is active on most tokens)."""
    layer, position, feature = graph.features.numpy().T
    value = graph.values.numpy()
    order = np.lexsort((position, -value, feature, layer))
    layer, position, feature, value = layer[order], position[order], feature[order], value[order]
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(layer) != 0) | (np.diff(feature) != 0)
    starts = np.flatnonzero(new)
    if not len(starts):
        return
    ends = np.append(starts[1:], len(order))
    strong = value >= _SHARE * np.repeat(value[starts], ends - starts)
    counts = np.add.reduceat(strong, starts)
    pairs = np.stack([layer[starts], feature[starts]], 1).tolist()
    positions = position.tolist()
    most = _MOST * graph.positions if graph.positions >= _FEWEST else np.inf
    for (own_layer, own_feature), begin, end, count in zip(
        pairs, starts.tolist(), ends.tolist(), counts.tolist(), strict=True
    ):
        yield (own_layer, own_feature), positions[begin : begin + max(1, count)], end - begin > most
