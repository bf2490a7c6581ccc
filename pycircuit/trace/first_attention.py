"""First attention below a target.

A target reads one position, so its gradient has one row there. One attention below, that gradient has rank `heads`: a
few vectors, spread over the positions by the rows of the attention pattern. Projecting those vectors replaces
projecting every position, on both sides of the next attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from pycircuit.model.frozen import FrozenLayer
from pycircuit.ops import StoredAttention

from .precision import Denominators, Products, has_fused_kernels


@dataclass(frozen=True, eq=False)
class TargetRows:
    """Rows of consecutive targets of a tile: target t owns offsets[t] .. offsets[t + 1]. The offsets are on the host.

    prefix_ptr: [targets + 1], the offsets on the device, from any start; tile_target, position: [rows], of each row;
    first: the first of the targets in the tile.
    """

    offsets: np.ndarray
    prefix_ptr: Tensor
    tile_target: Tensor
    position: Tensor
    first: int

    @cached_property
    def longest(self) -> int:
        return int(np.diff(self.offsets).max())

    @cached_property
    def last(self) -> Tensor:
        """Return the last row of each target."""
        return self.prefix_ptr[1:] - (self.prefix_ptr[:1] + 1)

    @cached_property
    def padded(self) -> Tensor:
        """Return the index of each row if every target had `longest` of them: [rows]."""
        return (self.tile_target - self.first) * self.longest + self.position

    @cached_property
    def equally_long(self) -> list[tuple[slice, slice, int]]:
        """Every run of neighbours with equally many rows, as (targets, their rows, rows of each)."""
        lengths = np.diff(self.offsets)
        begins = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist()]
        return [
            (slice(begin, end), slice(int(self.offsets[begin]), int(self.offsets[end])), int(lengths[begin]))
            for begin, end in zip(begins, [*begins[1:], len(lengths)], strict=True)
        ]


@dataclass(frozen=True, eq=False)
class FirstAttention:
    """Gradients of targets below their first attention, in factors.

    Row j of target t is the sum over heads h of pattern[h, query[t], j] / sigma[j] * vectors[h, t], plus
    vectors[heads, t] at the target's position. pattern: [heads, queries, keys]; query: [targets], None for t itself;
    sigma: [positions], None for ones; vectors: [heads + 1, targets, n].
    """

    pattern: Tensor
    query: Tensor | None
    sigma: Tensor | None
    vectors: Tensor

    def fill(self, out: Tensor, rows: TargetRows, sigma: Tensor | None = None) -> None:
        """Write the rows of every target to out [rows, n], each over sigma at its position."""
        if has_fused_kernels(out):
            spread = import_module("pycircuit.kernels.spread").spread
            spread(self.vectors, self.pattern, self.query, self.sigma, sigma, rows.prefix_ptr, rows.longest, out)
            return
        vectors, own = self.vectors[:-1].transpose(0, 1), self.vectors[-1]
        if out.device.type == "cpu":
            for targets, span, length in rows.equally_long:
                pattern = self.pattern[:, targets, :length].permute(1, 2, 0)
                torch.bmm(pattern, vectors[targets], out=out[span].unflatten(0, (-1, length)))
        else:  # a few launches, whatever the number of targets, as if all were as long as the longest
            padded = torch.bmm(self.pattern[..., : rows.longest].permute(1, 2, 0), vectors)
            torch.index_select(padded.flatten(0, 1), 0, rows.padded, out=out)
        out.index_add_(0, rows.last, own)
        if sigma is not None:
            out /= sigma[rows.position][:, None]

    def project(self, weight: Tensor, products: Products) -> FirstAttention:
        """Return these gradients with every row multiplied by weight [n, m]."""
        vectors = products.project(self.vectors.flatten(0, 1), weight).unflatten(0, self.vectors.shape[:2])
        return FirstAttention(self.pattern, self.query, self.sigma, vectors)


def first_attention(
    layer: FrozenLayer, gradient: Tensor, position: Tensor, longest: int, products: Products
) -> FirstAttention:
    """Return the gradients below a layer's attention of targets that have one row each above it.

    gradient: [targets, width]; position: [targets]; longest: positions that the farthest target sees.
    """
    by_head = head_gradients(layer, gradient, position, products)
    grouped = by_head.reshape(layer.kv_heads, -1, layer.head_width)  # heads that share a key follow one another
    vectors = gradient.new_empty(layer.heads + 1, *gradient.shape)
    of_heads = vectors[:-1].view(layer.kv_heads, -1, gradient.shape[1])
    torch.bmm(grouped, layer.back_v.unflatten(0, (layer.kv_heads, -1)), out=of_heads)
    vectors[-1] = gradient
    if not has_fused_kernels(gradient):
        return FirstAttention(pattern_rows(layer, position, longest), None, None, vectors)
    sigma = None if layer.attention_norm is None else layer.attention_norm.sigma
    if isinstance(layer.attention, StoredAttention):  # its rows are read in place
        return FirstAttention(layer.attention.pattern, position, sigma, vectors)
    return FirstAttention(layer.attention.pattern_rows(position, longest), None, sigma, vectors)


def head_gradients(layer: FrozenLayer, gradient: Tensor, position: Tensor, products: Products) -> Tensor:
    """Return gradients of each head's output from those of attention's output: [heads, targets, head_width].

    gradient: [targets, width], one row a target; position: [targets].
    """
    norm = layer.post_attention_norm
    divisor = None if norm is None else Denominators(norm.sigma, position)
    by_head = products.project(gradient, layer.back_o, divisor=divisor)
    return by_head.unflatten(1, (layer.heads, -1)).transpose(0, 1)


def pattern_rows(layer: FrozenLayer, position: Tensor, longest: int) -> Tensor:
    """Return the attention pattern's rows at some queries, over the norm's denominators: [heads, targets, longest]."""
    pattern = layer.attention.pattern_rows(position, longest)
    return pattern if layer.attention_norm is None else pattern.div_(layer.attention_norm.sigma[:longest])


def token_edges(layer: FrozenLayer, gradient: Tensor, position: Tensor, values: Tensor, products: Products) -> Tensor:
    """Return edges from tokens through the first layer's attention to targets with one row each: [targets, longest].

    values: [longest, kv_heads * head_width], token embeddings @ back_v.T, projected once for all targets, so that
    neither the gradients below the attention nor their vectors are needed.
    """
    by_head = head_gradients(layer, gradient, position, products)
    pattern = pattern_rows(layer, position, len(values))
    grouped = by_head.reshape(layer.kv_heads, -1, layer.head_width)
    head_values = values.unflatten(1, (layer.kv_heads, -1)).transpose(0, 1)
    return (grouped @ head_values.transpose(1, 2)).view(pattern.shape).mul_(pattern).sum(0)
