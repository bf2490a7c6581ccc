"""Useful operations of a sweep: those of targets inside their causal cones."""

from __future__ import annotations

from torch import Tensor

from pycircuit.graph import Graph

from .shapes import Shape


def expanded(graph: Graph) -> tuple[Tensor, Tensor]:
    """(layer, position) of every row of a graph: [rows] each; a target at the end of the stream has layer `layers`."""
    inner = graph.row_node < graph.first_error
    layer, position = graph.row_node.new_full(graph.row_node.shape, graph.layers), graph.row_node.clone()
    chosen = graph.features[graph.row_node[inner]]
    layer[inner], position[inner] = chosen[:, 0], chosen[:, 1]
    position[~inner] = graph.targets.positions[graph.row_node[~inner] - graph.first_target]
    return layer, position


def operations(shape: Shape, layer: Tensor, position: Tensor) -> float:
    """Floating-point operations of the rows at (layer, position): [rows] each.

    A target at position p owns n = p + 1 positions. Each attention from its own layer's (an output: the last one's)
    down costs, with H query and G key-value heads of width h and a stream of width d,

        2 n d (H h + G h)  for W_O and W_V,    H h n (n + 1)  for the causal half of A^T,

    and each MLP below the target's read 2 n d for every active feature that writes there and the error of a position,
    as do the tokens once. Across layers, the features of all layers up to an MLP's own write there. The first of
    these attentions starts from a single row, so it needs next to nothing and does not count.
    """
    n, crossed = (position + 1).double(), _crossed(shape, layer)
    query, value = _widths(shape)
    attention = 2 * n * shape.width * (query + value) + query * n * (n + 1)
    below = layer.double()
    writing = below * (below + 1) / 2 if shape.cross_layer else below
    scored = 2 * n * shape.width * (writing * shape.active + below + 1)
    return float((crossed * attention + scored).sum())


def fewest(shape: Shape, layer: Tensor, position: Tensor) -> float:
    """Operations that the sweep needs: without the products that the two ends of a target's path save.

    The first attention leaves a gradient of rank H. Its rows are sums of H vectors, 2 n d H, and so are those after
    the next W_O, 2 n (H h) H, which replace that product. Below the last attention only tokens are left, so their
    G h values, 2 n (G h), replace its W_V and the score of the stream's rows against them stays.
    """
    n, crosses = (position + 1).double(), (_crossed(shape, layer) > 0).double()
    query, value = _widths(shape)
    saved = 2 * n * shape.width * (query + value)
    instead = 2 * n * (shape.heads * (shape.width + query) + value)
    return operations(shape, layer, position) + float((crosses * (instead - saved)).sum())


def _crossed(shape: Shape, layer: Tensor) -> Tensor:
    """Attentions that a target's gradient crosses with all of its rows."""
    return layer.clamp(max=shape.layers - 1).double()


def _widths(shape: Shape) -> tuple[int, int]:
    """Widths of all query heads and of all key-value heads."""
    return shape.heads * shape.head_width, shape.kv_heads * shape.head_width
