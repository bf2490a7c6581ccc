"""Tokens whose logits features raise and lower most, by their decoder rows alone.

A feature's direct effect on the logits is the sum of its decoder rows through the final norm's gain and the
unembedding. Norm denominators and biases are left out: they order no token before another.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pycircuit.model import ReplacementModel
from pycircuit.model.frozen import unembed
from pycircuit.model.weights import Norm
from pycircuit.ops import FileRows, SparseFeatures

LOGITS_AT_ONCE = 1 << 24
BLOCK = 1 << 17  # logits of raised tokens computed at once: a cache holds them
GPU_BLOCK = 1 << 26


class OutputTokens:
    """The `count` most raised and most lowered tokens of features, in blocks."""

    def __init__(self, model: ReplacementModel, count: int) -> None:
        self.model, self.count = model, min(count, len(model.weights.unembedding))
        self.unbiased = replace(model.weights, unembedding_bias=None)  # no feature contributes to the bias

    @torch.no_grad()
    def extremes(self, layer: int, features: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """(token ids from the highest logit down, from the lowest up) of each. features: [n] int64, ascending."""
        if not self.count or not len(features):
            return [[] for _ in features], [[] for _ in features]
        weights = self.model.weights
        read = self.directions(layer, features)
        best, worst = [], []
        for rows in read.split(max(1, LOGITS_AT_ONCE // len(weights.unembedding))):
            logits = unembed(self.unbiased, rows)
            best += logits.topk(self.count).indices.tolist()
            worst += logits.topk(self.count, largest=False).indices.tolist()
        return best, worst

    @torch.no_grad()
    def directions(self, layer: int, features: Tensor) -> Tensor:
        """The vectors whose products with the unembedding are the features' direct effects on logits: [n, width]."""
        weights = self.model.weights
        return _apply_norm(weights.final_norm, self._written(layer, features.to(weights.device)))

    @torch.no_grad()
    def random_directions(self, count: int) -> Tensor:
        """Directions of decoder rows drawn at random, always the same ones: [count, width]."""
        weights = self.model.weights
        rows = torch.randn(count, weights.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return _apply_norm(weights.final_norm, rows.to(weights.device, weights.dtype))

    @torch.no_grad()
    def raised(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """(ids of the `count` tokens raised most, by how many standard deviations the first is above the mean logit).

        directions: [n, width]. Logits are computed a block of the vocabulary at a time, in little memory.
        """
        weights = self.model.weights
        unembedding, dtype = weights.unembedding, directions.dtype
        step = max(1, _block(directions.device) // max(len(directions), directions.shape[1]))
        best = directions.new_zeros(len(directions), 0)
        tokens = torch.zeros(len(directions), 0, dtype=torch.int64, device=directions.device)
        squares = torch.zeros(len(directions), dtype=torch.float64, device=best.device)
        for begin in range(0, len(unembedding), step):
            logits = directions @ unembedding[begin : begin + step].to(dtype).T
            largest = logits.topk(min(self.count, logits.shape[1]))
            squares += logits.square_().sum(1)
            merged = torch.cat([best, largest.values], 1)
            ids = torch.cat([tokens, largest.indices + begin], 1)
            best, order = merged.topk(min(self.count, merged.shape[1]))
            tokens = ids.gather(1, order)
        mean = (directions @ weights.unembedding_mean.to(dtype)).double()
        deviation = (squares / len(unembedding) - mean.square()).clamp_min(0).sqrt()
        return tokens, torch.where(deviation > 0, (best[:, 0].double() - mean) / deviation, torch.zeros_like(mean))

    def _written(self, layer: int, features: Tensor) -> Tensor:
        """Sum over layers that a unit of each feature adds to the stream, without a post-norm's denominator: [n, d]."""
        transcoders, weights = self.model.transcoders, self.model.weights
        rows = _rows(transcoders.w_dec[layer], features).to(weights.dtype)
        rows = rows[:, None] if rows.ndim == 2 else rows  # a per-layer transcoder has one slot: its own layer's
        if transcoders.writes == "mlp_out":
            return rows.sum(1)
        norms = [weights.layers[layer + slot].post_mlp_norm for slot in range(rows.shape[1])]
        return torch.stack([_apply_norm(norm, rows[:, slot]) for slot, norm in enumerate(norms)]).sum(0)


def _block(device: torch.device) -> int:
    """Numbers of a block of logits, and of the unembedding's rows beside it."""
    return BLOCK if device.type == "cpu" else GPU_BLOCK


def _rows(w_dec: Tensor | FileRows, features: Tensor) -> Tensor:
    """Decoder rows of features: [n, (slots,) width]."""
    if isinstance(w_dec, Tensor):
        return w_dec[features]
    ptr = torch.tensor([0, len(features)], device=features.device)
    return w_dec.gather(SparseFeatures(ptr, features, torch.ones(len(features), device=features.device)))[1]


def _apply_norm(norm: Norm | None, rows: Tensor) -> Tensor:
    """Apply a norm without its denominator and its bias, which are equal for all tokens."""
    if norm is None:
        return rows
    return (rows - rows.mean(-1, keepdim=True) if norm.center else rows) * norm.gain
