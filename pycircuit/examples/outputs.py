"""Tokens whose logits features raise and lower most, by their decoder rows alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pycircuit.model import ReplacementModel
from pycircuit.model.frozen import unembed
from pycircuit.model.weights import Norm
from pycircuit.ops import FileRows, SparseFeatures

LOGITS_AT_ONCE = 1 << 24


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
        read = _apply_norm(weights.final_norm, self._written(layer, features.to(weights.device)))
        best, worst = [], []
        for rows in read.split(max(1, LOGITS_AT_ONCE // len(weights.unembedding))):
            logits = unembed(self.unbiased, rows)
            best += logits.topk(self.count).indices.tolist()
            worst += logits.topk(self.count, largest=False).indices.tolist()
        return best, worst

    def _written(self, layer: int, features: Tensor) -> Tensor:
        """Sum over layers that a unit of each feature adds to the stream, without a post-norm's denominator: [n, d]."""
        transcoders, weights = self.model.transcoders, self.model.weights
        rows = _rows(transcoders.w_dec[layer], features).to(weights.dtype)
        rows = rows[:, None] if rows.ndim == 2 else rows  # a per-layer transcoder has one slot: its own layer's
        if transcoders.writes == "mlp_out":
            return rows.sum(1)
        norms = [weights.layers[layer + slot].post_mlp_norm for slot in range(rows.shape[1])]
        return torch.stack([_apply_norm(norm, rows[:, slot]) for slot, norm in enumerate(norms)]).sum(0)


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
