"""The tokens that features speak for and against, by their decoder rows alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pycircuit.model import ReplacementModel
from pycircuit.model.frozen import unembed
from pycircuit.model.weights import Norm
from pycircuit.ops import FileRows, SparseFeatures

LOGITS = 1 << 24  # held at one time


class Outputs:
    """For features in blocks, the `count` most raised and most lowered tokens."""

    def __init__(self, model: ReplacementModel, count: int) -> None:
        self.model, self.count = model, min(count, len(model.weights.unembedding))
        self.head = replace(model.weights, unembedding_bias=None)  # which no feature has a part in

    @torch.no_grad()
    def extremes(self, layer: int, features: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """(token ids from the highest down, from the lowest up) of each. features: [n] int64, rising."""
        if not self.count or not len(features):
            return [[] for _ in features], [[] for _ in features]
        weights = self.model.weights
        read = _through(weights.final_norm, self._written(layer, features.to(weights.device)))
        best, worst = [], []
        for rows in read.split(max(1, LOGITS // len(weights.unembedding))):
            logits = unembed(self.head, rows)
            best += logits.topk(self.count).indices.tolist()
            worst += logits.topk(self.count, largest=False).indices.tolist()
        return best, worst

    def _written(self, layer: int, features: Tensor) -> Tensor:
        """What one unit of each adds to the stream, all layers together, but for a post-norm's denominator: [n, d]."""
        transcoders, weights = self.model.transcoders, self.model.weights
        rows = _rows(transcoders.w_dec[layer], features).to(weights.dtype)
        rows = rows[:, None] if rows.ndim == 2 else rows  # a per-layer transcoder has one slot: its own layer's
        if transcoders.writes == "mlp_out":
            return rows.sum(1)
        norms = [weights.layers[layer + slot].post_mlp_norm for slot in range(rows.shape[1])]
        return torch.stack([_through(norm, rows[:, slot]) for slot, norm in enumerate(norms)]).sum(0)


def _rows(w_dec: Tensor | FileRows, features: Tensor) -> Tensor:
    """[n, (slots,) width]."""
    if isinstance(w_dec, Tensor):
        return w_dec[features]
    ptr = torch.tensor([0, len(features)], device=features.device)
    return w_dec.gather(SparseFeatures(ptr, features, torch.ones(len(features), device=features.device)))[1]


def _through(norm: Norm | None, rows: Tensor) -> Tensor:
    """Through a norm without its denominator and its bias, which are the same for all tokens."""
    if norm is None:
        return rows
    return (rows - rows.mean(-1, keepdim=True) if norm.center else rows) * norm.gain
