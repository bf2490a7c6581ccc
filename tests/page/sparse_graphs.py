"""Random graphs as large as a deep model's and as sparse as a drawing needs."""

from __future__ import annotations

import torch
from graphs import numbered_targets, numbered_tokens

import pycircuit as pc
from pycircuit.graph.csr import Rows


def sparse_graph(layers: int, positions: int, features: int, reads: int = 12, targets: int = 10) -> pc.Graph:
    """A graph in which every feature has a row of this many inputs, from layers below and no later positions."""
    g = torch.Generator().manual_seed(0)
    place = torch.randint(0, layers * (positions - 1), (features,), generator=g).sort().values
    layer, position = place // (positions - 1), place % (positions - 1) + 1
    index = torch.stack([layer, position, torch.arange(features)], 1)
    first_error, first_token = features, features + layers * positions
    rows: list[torch.Tensor] = []
    for own_layer, own_position in [*index[:, :2].tolist(), *[(layers, positions - 1)] * targets]:
        below = ((layer < own_layer) & (position <= own_position)).nonzero()[:, 0]
        chosen = below[torch.randperm(len(below), generator=g)[: reads * (4 if own_layer == layers else 1)]]
        token = first_token + torch.randint(0, own_position + 1, (2,), generator=g).unique()
        error = first_error + torch.arange(own_layer)[-1:] * positions + own_position
        rows.append(torch.cat([chosen, error, token]).sort().values)
    pointers = torch.tensor([0, *map(len, rows)]).cumsum(0)
    weight = torch.randn(int(pointers[-1]), generator=g).exp() * torch.randn(int(pointers[-1]), generator=g)
    totals = torch.stack([row.double().sum() for row in weight.split([len(row) for row in rows])])
    return pc.Graph(
        features=index,
        values=torch.ones(features),
        rows=Rows(pointers, torch.cat(rows).int(), weight),
        row_node=torch.cat([torch.arange(features), first_token + positions + torch.arange(targets)]),
        bias=torch.zeros(len(rows)),
        preactivation=totals,
        targets=numbered_targets(targets, positions),
        tokens=numbered_tokens(positions),
        layers=layers,
        prompt="a random graph",
        vocab_size=1000,
    )
