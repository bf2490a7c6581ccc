"""First attention below a target.

A target reads one position, so its gradient has one row there. One attention below, that gradient has rank `heads`: a
few vectors, spread over the positions by the rows of the attention pattern. Projecting those vectors replaces
projecting every position, on both sides of the next attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pycircuit.model.frozen import FrozenLayer

from .precision import Products


@dataclass(frozen=True, eq=False)
class TargetRows:
    """Rows of consecutive targets of a tile: target t owns offsets[t] .. offsets[t + 1]. The offsets are on the host.

    target, position: [rows], of each row; last: [targets], the last row of each target.
    """

    offsets: np.ndarray
    target: Tensor
    position: Tensor
    last: Tensor
    _padded: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def equally_long(self) -> list[tuple[slice, slice, int]]:
        """Every run of neighbours with equally many rows, as (targets, their rows, rows of each)."""
        lengths = np.diff(self.offsets)
        begins = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist()]
        return [
            (slice(begin, end), slice(int(self.offsets[begin]), int(self.offsets[end])), int(lengths[begin]))
            for begin, end in zip(begins, [*begins[1:], len(lengths)], strict=True)
        ]

    def padded(self, longest: int) -> Tensor:
        """Return the index of each row if every target had `longest` of them: [rows]."""
        if longest not in self._padded:
            self._padded[longest] = self.target * longest + self.position
        return self._padded[longest]


@dataclass(frozen=True, eq=False)
class FirstAttention:
    """Gradients of targets below their first attention, in factors.

    Row j of target t is the sum over heads h of pattern[h, t, j] * vectors[h, t], plus own[t] at the target's position.
    pattern: [heads, targets, longest], zero past a target's position; vectors: [heads, targets, n]; own: [targets, n].
    """

    pattern: Tensor
    vectors: Tensor
    own: Tensor

    def fill(self, out: Tensor, rows: TargetRows) -> None:
        """Write the rows of every target to out [rows, n]."""
        if out.device.type != "cpu":
            self._fill_together(out, rows)
            return
        for targets, span, length in rows.equally_long:
            pattern, vectors = self.pattern[:, targets, :length], self.vectors[:, targets]
            torch.bmm(pattern.permute(1, 2, 0), vectors.transpose(0, 1), out=out[span].unflatten(0, (-1, length)))
        out.index_add_(0, rows.last, self.own)

    def _fill_together(self, out: Tensor, rows: TargetRows) -> None:
        """Write the rows in a few launches, whatever the number of targets, as if all were as long as the longest."""
        padded = torch.bmm(self.pattern.permute(1, 2, 0), self.vectors.transpose(0, 1))
        torch.index_select(padded.flatten(0, 1), 0, rows.padded(self.pattern.shape[2]), out=out)
        out.index_add_(0, rows.last, self.own)

    def project(self, weight: Tensor, products: Products) -> FirstAttention:
        """Return these gradients with every row multiplied by weight [n, m]."""
        vectors = products.project(self.vectors.flatten(0, 1), weight).unflatten(0, self.vectors.shape[:2])
        return FirstAttention(self.pattern, vectors, products.project(self.own, weight))


def first_attention(
    layer: FrozenLayer, gradient: Tensor, position: Tensor, longest: int, products: Products
) -> FirstAttention:
    """Return the gradients below a layer's attention of targets that have one row each above it.

    gradient: [targets, width]; position: [targets]; longest: positions that the farthest target sees.
    """
    by_head = head_gradients(layer, gradient, position, products)
    grouped = by_head.reshape(layer.kv_heads, -1, layer.head_width)  # heads that share a key follow one another
    vectors = grouped @ layer.back_v.unflatten(0, (layer.kv_heads, -1))
    return FirstAttention(
        pattern_rows(layer, position, longest), vectors.view(layer.heads, len(gradient), -1), gradient
    )


def head_gradients(layer: FrozenLayer, gradient: Tensor, position: Tensor, products: Products) -> Tensor:
    """Return gradients of each head's output from those of attention's output: [heads, targets, head_width].

    gradient: [targets, width], one row a target; position: [targets].
    """
    norm = layer.post_attention_norm
    by_head = products.project(gradient, layer.back_o, divisor=None if norm is None else norm.sigma[position])
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
