"""Cost of a tile of the sweep in bytes, from the shapes of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pycircuit.transcoders import Transcoders


class LayerShape(Protocol):
    """Weights of a layer, frozen or not."""

    @property
    def w_o(self) -> torch.Tensor: ...
    @property
    def w_v(self) -> torch.Tensor: ...
    @property
    def heads(self) -> int: ...
    @property
    def post_mlp_norm(self) -> Any: ...


@dataclass(frozen=True)
class TileCost:
    """Bytes of a tile: of a row of the state, of a target's position in the first attention, of a target."""

    row: int
    position: int
    target: int

    def of(self, rows: Any, targets: Any, longest: Any, target_bytes: int = 0) -> Any:
        """Return the bytes of tiles, from numbers or arrays of them. target_bytes: of the edges of each target."""
        return rows * self.row + targets * (longest * self.position + self.target + target_bytes)


def tile_cost(
    layers: Sequence[LayerShape],
    transcoders: Transcoders,
    width: int,
    itemsize: int,
    stored: bool,
    native: bool = True,
    product_bytes: int = 0,
    padded_positions: bool = False,
) -> TileCost:
    """Return the cost of a tile. itemsize: bytes of a number; native: attention is applied without padding.

    product_bytes: bytes that a number takes besides while it is multiplied; padded_positions: the first attention of
    all targets is spread over positions at once, as if all were as long as the longest.
    """
    heads = max(layer.heads for layer in layers)
    query = max(layer.w_o.shape[1] for layer in layers)
    value = max(layer.w_v.shape[0] for layer in layers)
    inner = query + value
    writing = 2 if transcoders.writes == "mlp_raw" and layers[0].post_mlp_norm is not None else 0
    skipping = 3 if any(w is not None for w in transcoders.w_skip) else 0
    padding = 0 if native else 4 * query
    return TileCost(
        row=itemsize * (width + inner + max(writing, skipping + writing // 2) * width + padding)
        + 16
        + product_bytes * max(width, value),
        position=itemsize * (heads * (2 if stored else 3) + 2 + padded_positions * max(width, query)) + 9,
        target=itemsize * (heads * (width + query) + 4 * query + 7 * width) + product_bytes * heads * width,
    )
