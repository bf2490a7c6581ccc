"""The conservation law of a graph: edges and bias of every row add up to its pre-activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .graph import Graph


def residual(graph: Graph) -> Tensor:
    """Relative violation of the law, row by row: [rows] float64; NaN without pre-activations."""
    if graph.provenance.get("law") == "unknown":
        return torch.full((graph.rows.count,), torch.nan, dtype=torch.float64, device="cpu")
    expected, weight = _array(graph.preactivation), graph.rows.weight.numpy()
    difference = _array(graph.dropped) + _array(graph.bias) - expected
    scale = _array(graph.dropped_mass) + np.abs(_array(graph.bias)) + np.abs(expected)
    for block in graph.rows.blocks():
        terms = block.gather(weight).astype(np.float64)
        difference[block.rows] += block.reduce(np.add, terms)
        scale[block.rows] += block.reduce(np.add, np.abs(terms, out=terms))
    np.maximum(scale, _array(graph.product_norm), out=scale)
    return torch.from_numpy(np.divide(np.abs(difference), scale, out=np.zeros_like(difference), where=scale > 0))


def _array(t: Tensor | None) -> np.ndarray:
    assert t is not None  # set when the graph was made
    return t.numpy().astype(np.float64)
