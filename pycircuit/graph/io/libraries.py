"""Graphs as objects of other libraries, which are imported on use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph


def library(method: str, module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"Graph.{method}: {package} must be installed, got {error}; pip install {package}") from None


def to_networkx(graph: Graph) -> Any:
    """Convert a graph to a networkx.DiGraph."""
    out = library("to_networkx", "networkx", "networkx").DiGraph()
    out.add_nodes_from((node, graph.describe(node)) for node in range(graph.nodes))
    targets = graph.row_node.numpy()[graph.rows.row_of_entry()].tolist()
    edges = zip(graph.rows.column.tolist(), targets, graph.rows.weight.tolist(), strict=True)
    out.add_weighted_edges_from(edges)
    return out


def to_scipy(graph: Graph) -> Any:
    """Convert a graph to a scipy.sparse.csr_array."""
    sparse = library("to_scipy", "scipy.sparse", "scipy")
    node, lengths = graph.row_node.numpy(), np.zeros(graph.nodes, np.int64)
    lengths[node] = graph.rows.lengths()
    column, weight = (np.empty_like(t.numpy()) for t in (graph.rows.column, graph.rows.weight))
    offset = 0
    for block in graph.rows.blocks(np.argsort(node)):
        entries = slice(offset, offset := offset + int(block.lengths.sum()))
        column[entries] = block.gather(graph.rows.column.numpy())
        weight[entries] = block.gather(graph.rows.weight.numpy())
    pointers = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
    return sparse.csr_array((weight, column, pointers), shape=(graph.nodes, graph.nodes))
