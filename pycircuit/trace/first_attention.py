"""The first attention below a target.

A target starts at one position, so there its state is one row; one attention further down it is of rank `heads`:
a few vectors, spread over the positions by the rows of the pattern. Projecting those vectors replaces projecting
every position, on both sides of the next attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pycircuit.model.frozen import FrozenLayer

from .precision import Products


@dataclass(frozen=True, eq=False)
class TargetRows:
    """Where the rows of consecutive targets of a tile lie: of target t, offsets[t] .. offsets[t + 1], on the host.

    target, position: [rows], of each row; last: [targets], each one's last row.
    """

    offsets: np.ndarray
    target: Tensor
    position: Tensor
    last: Tensor
    _places: dict[int, Tensor] = field(default_factory=dict)

    def places(self, longest: int) -> Tensor:
        """Where each row lies if every target has `longest` of them."""
        if longest not in self._places:
            self._places[longest] = self.target * longest + self.position
        return self._places[longest]


@dataclass(frozen=True, eq=False)
class Hop:
    """Row j of target t: sum over h of spread[h, t, j] * vectors[h, t], plus own[t] at the target's own position.

    spread: [heads, targets, longest], zero past a target's position; vectors: [heads, targets, n]; own: [targets, n].
    """

    spread: Tensor
    vectors: Tensor
    own: Tensor

    def fill(self, out: Tensor, rows: TargetRows) -> None:
        """Write the rows of every target: out [rows, n]."""
        if out.device.type != "cpu":
            self._fill_together(out, rows)
            return
        ends = rows.offsets.tolist()
        for t, own in enumerate(self.own):
            mine = out[ends[t] : ends[t + 1]]
            torch.mm(self.spread[:, t, : len(mine)].T, self.vectors[:, t], out=mine)
            mine[-1] += own

    def _fill_together(self, out: Tensor, rows: TargetRows) -> None:
        """The same in a few launches, whatever the number of targets: as if all were as long as the longest."""
        padded = torch.bmm(self.spread.permute(1, 2, 0), self.vectors.transpose(0, 1))
        torch.index_select(padded.flatten(0, 1), 0, rows.places(self.spread.shape[2]), out=out)
        out.index_add_(0, rows.last, self.own)

    def through(self, w: Tensor, products: Products) -> Hop:
        """The same, every row projected by w: [n, m]."""
        vectors = products.project(self.vectors.flatten(0, 1), w).unflatten(0, self.vectors.shape[:2])
        return Hop(self.spread, vectors, products.project(self.own, w))


def queries(layer: FrozenLayer, rows: Tensor, position: Tensor, products: Products) -> Tensor:
    """Gradients at attention's output, one row a target, to its heads: [heads, targets, head_width]."""
    y = products.project(rows, layer.back_o)
    if layer.post_attention_norm is not None:
        y /= layer.post_attention_norm.sigma[position, None]
    return y.unflatten(1, (layer.heads, -1)).transpose(0, 1)


def spread(layer: FrozenLayer, position: Tensor, longest: int) -> Tensor:
    """How heads spread one row over the positions before it, norm included: [heads, targets, longest]."""
    pattern = layer.attention.pattern_rows(position, longest)
    return pattern if layer.attention_norm is None else pattern.div_(layer.attention_norm.sigma[:longest])


def hop(layer: FrozenLayer, rows: Tensor, position: Tensor, longest: int, products: Products) -> Hop:
    """The state below a layer's attention of targets that come to it with one row each: rows [targets, width].

    longest: positions that the farthest target sees.
    """
    y = queries(layer, rows, position, products)
    grouped = y.reshape(layer.kv_heads, -1, layer.head_width)  # heads that share a key follow one another
    vectors = grouped @ layer.back_v.unflatten(0, (layer.kv_heads, -1))
    return Hop(spread(layer, position, longest), vectors.view(layer.heads, len(rows), -1), rows)


def land(layer: FrozenLayer, rows: Tensor, position: Tensor, values: Tensor, products: Products) -> Tensor:
    """What the way through this attention finds in sources below it, of which it sees `values`: [targets, longest].

    values: [longest, kv_heads * head_width], sources @ back_v.T: projected once for all targets, so that neither
    the state of a target nor its vectors are needed.
    """
    y, weights = queries(layer, rows, position, products), spread(layer, position, len(values))
    grouped = y.reshape(layer.kv_heads, -1, layer.head_width)
    by_head = values.unflatten(1, (layer.kv_heads, -1)).transpose(0, 1)
    return (grouped @ by_head.transpose(1, 2)).view(weights.shape).mul_(weights).sum(0)
