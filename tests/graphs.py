"""Graphs for the tests: random ones that obey the law, and a small one made by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycircuit.graph import Graph, Rows, Targets, Tokens


def assemble(matrix: Tensor, features: list[list[int]], layers: int, positions: int, weights: list[float]) -> Graph:
    """The graph of [nodes, nodes] edges; every feature and target with an edge gets a row, in shuffled order."""
    count, first_target = len(features), len(features) + (layers + 1) * positions
    explained = [i for i in range(len(matrix)) if matrix[i].any() or i >= first_target]
    order = torch.tensor(explained, dtype=torch.int64)[
        torch.randperm(len(explained), generator=torch.Generator().manual_seed(len(explained)))
    ]
    rows, _, _ = Rows.from_dense(matrix[order])
    bias = torch.linspace(-1, 1, len(order), dtype=torch.float64)
    return Graph(
        features=torch.tensor(features, dtype=torch.int64).reshape(count, 3),
        values=torch.linspace(1, 2, count),
        rows=rows,
        row_node=order,
        bias=bias,
        preactivation=matrix[order].double().sum(1) + bias,
        targets=Targets(
            [f" t{i}" for i in range(len(weights))],
            torch.arange(len(weights)) + 40,
            torch.tensor(weights, dtype=torch.float64),
            torch.full((len(weights),), positions - 1),
        ),
        tokens=Tokens(torch.arange(positions) + 7, [f" w{i}" for i in range(positions)]),
        layers=layers,
        prompt="".join(f" w{i}" for i in range(positions)),
        vocab_size=100,
        timings={"sweep": 0.25},
        provenance={"model": "random", "scan": "set"},
    )


def random_matrix(
    features: list[list[int]], layers: int, positions: int, targets: int, density: float, seed: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """Edges that a model could have: from lower layers and positions no later. Some features get no row."""
    g = torch.Generator().manual_seed(seed)
    layer = [f[0] for f in features] + [n for n in range(layers) for _ in range(positions)] + [-1] * positions
    place = [f[1] for f in features] + list(range(positions)) * (layers + 1)
    sources, count = len(layer), len(features)
    out = torch.zeros(sources + targets, sources + targets, dtype=dtype)
    reads = torch.tensor([*(f[0] for f in features), *[layers] * targets])
    position = torch.tensor([*(f[1] for f in features), *[positions] * targets])
    can = (torch.tensor(layer) < reads[:, None]) & (torch.tensor(place) <= position[:, None])
    can &= torch.rand(can.shape, generator=g) < density
    can[:count] &= torch.rand(count, 1, generator=g) < 0.9
    edges = torch.randn(can.shape, generator=g, dtype=dtype) * can
    out[:count, :sources], out[sources:, :sources] = edges[:count], edges[count:]
    return out


def random_features(count: int, layers: int, positions: int, seed: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randint(n, (count,), generator=g) for n in (layers, positions, 9)], 1)
    return torch.unique(drawn, dim=0).tolist()


def random_graph(
    count: int = 30, layers: int = 4, positions: int = 3, targets: int = 2, density: float = 0.6, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Graph:  # fmt: skip
    features = random_features(count, layers, positions, seed)
    matrix = random_matrix(features, layers, positions, targets, density, seed, dtype)
    return assemble(matrix, features, layers, positions, [0.6, 0.3, 0.05][:targets])


def labelled_graph(seed: int = 0, **options: Any) -> Graph:
    graph = random_graph(seed=seed, **options)
    names = ["Texas", 'say <Austin> & "more"', "a name that is far too long to be drawn in one box"]
    keys = sorted({(layer, feature) for layer, _, feature in graph.features.tolist()})
    return replace(graph, labels={key: names[i % 4] for i, key in enumerate(keys) if i % 4 < 3})


def by_hand() -> Graph:
    """Two layers, one position. Nodes: features 0 (layer 0), 1 (layer 1); errors 2, 3; token 4; target 5.

    target = 3 f1 + 1 f0 - 1 e1; f1 = 2 f0 + 2 e0; f0 = 4 token.
    """
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[5, 1], matrix[5, 0], matrix[5, 3] = 3, 1, -1
    matrix[1, 0], matrix[1, 2] = 2, 2
    matrix[0, 4] = 4
    return assemble(matrix, [[0, 0, 5], [1, 0, 6]], 2, 1, [1.0])


def numbered_targets(count: int, positions: int) -> Targets:
    """Targets t0, t1, ... at the last position, each with less weight than the one before."""
    weight = torch.linspace(1, 0.1, count, dtype=torch.float64) / 6
    return Targets([f" t{i}" for i in range(count)], torch.arange(count), weight, torch.full((count,), positions - 1))


def numbered_tokens(positions: int) -> Tokens:
    """Tokens w0, w1, ..."""
    return Tokens(torch.arange(positions), [f" w{i}" for i in range(positions)])


def cone_graph(
    layers: int, positions: int, active: int, expanded: int, targets: int = 10, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Graph:  # fmt: skip
    """As large as a trace's: `active` features at every (layer, position) but the first position, every row full
    over its causal cone, expanded features in rounds of increasing (layer, position) after the targets."""
    rng = np.random.default_rng(seed)
    place = np.array([(la, p) for la in range(layers) for p in range(1, positions)]).repeat(active, 0)
    features = np.column_stack([place, np.tile(np.arange(active), layers * (positions - 1))])
    n, errors = len(features), layers * positions
    position = np.concatenate([place[:, 1], np.tile(np.arange(positions), layers + 1)])
    layer = np.concatenate([place[:, 0], np.repeat(np.arange(layers), positions), np.full(positions, -1)])
    rounds = np.array_split(rng.permutation(n)[:expanded], min(8, max(1, expanded)))
    node = np.concatenate([n + errors + positions + np.arange(targets), *(np.sort(r) for r in rounds)])
    reads = np.where(node < n, layer[np.minimum(node, n - 1)], layers)
    until = np.where(node < n, position[np.minimum(node, n - 1)], positions)
    columns = [
        np.flatnonzero((layer < la) & (position <= p)).astype(np.int32) for la, p in zip(reads, until, strict=True)
    ]
    size = sum(map(len, columns))
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    weight *= torch.randn(size, generator=torch.Generator().manual_seed(seed + 1), dtype=dtype).exp_()
    row_ptr = torch.from_numpy(np.cumsum([0, *map(len, columns)]))
    rows = Rows(row_ptr, torch.from_numpy(np.concatenate(columns)), weight)
    totals = [float(weight[a:b].double().sum()) for a, b in itertools.pairwise(row_ptr.tolist())]
    return Graph(
        features=torch.from_numpy(features),
        values=torch.ones(n),
        rows=rows,
        row_node=torch.from_numpy(node),
        bias=torch.zeros(len(node)),
        preactivation=torch.tensor(totals, dtype=torch.float64),
        targets=numbered_targets(targets, positions),
        tokens=numbered_tokens(positions),
        layers=layers,
        vocab_size=1000,
    )
