"""Frozen attention, as stored patterns or as queries and keys that recompute them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class StoredAttention:
    """Stored attention patterns.

    pattern: [heads, positions, positions], row = query; entries above the diagonal are not read.
    kv_heads: query heads of a group are summed into one (grouped-query attention); default heads.
    """

    pattern: Tensor
    kv_heads: int | None = None

    @property
    def heads(self) -> int:
        return self.pattern.shape[0]

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def positions(self) -> int:
        return self.pattern.shape[1]

    def weights(self, positions: int) -> Tensor:
        """Patterns of the first positions, lower triangular: [heads, positions, positions]."""
        return self.pattern[:, :positions, :positions].tril()

    def pattern_rows(self, positions: Tensor, keys: int) -> Tensor:
        """Rows of every head at these positions, over keys 0 .. keys: [heads, len(positions), keys]."""
        return self.pattern[:, positions, :keys].masked_fill_(_hidden(positions, keys, 0), 0)


@dataclass(frozen=True, eq=False)
class RecomputedAttention:
    """Attention patterns recomputed from queries, keys and the log-sum-exp of the forward pass.

    pattern[i, j] = exp(softcap(scale * query[i] . key[j]) - log_sum_exp[i]) for j <= i, i - j < window.
    query: [heads, positions, width]; key: [kv_heads, positions, width], both after rotary embedding and
    norms; log_sum_exp: [heads, positions] over the keys a query attended to. softcap 0 and window 0 mean none.
    sinks: [heads], logits that take probability and lead nowhere; not included in log_sum_exp.
    """

    query: Tensor
    key: Tensor
    log_sum_exp: Tensor
    scale: float
    softcap: float = 0.0
    window: int = 0
    sinks: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.query.shape[0]

    @property
    def groups(self) -> int:
        return self.key.shape[0]

    @property
    def positions(self) -> int:
        return self.query.shape[1]

    @cached_property
    def normaliser(self) -> Tensor:
        """Logarithm of each row's denominator, sinks included: [heads, positions]; every tile of a sweep reads it."""
        return self.with_sinks(self.log_sum_exp)

    def with_sinks(self, log_sum_exp: Tensor) -> Tensor:
        """Logarithms of denominators, sinks included, of rows of every head: [heads, rows]."""
        if self.sinks is None:
            return log_sum_exp
        return torch.logaddexp(log_sum_exp, self.sinks[:, None].to(log_sum_exp.dtype))

    def weights(self, positions: int) -> Tensor:
        """Patterns of the first positions, lower triangular: [heads, positions, positions]."""
        wide = self.log_sum_exp.dtype
        key = self.key[:, :positions].to(wide).repeat_interleave(self.heads // self.groups, dim=0)
        products = self.query[:, :positions].to(wide) @ key.transpose(1, 2)
        return self._pattern(products, torch.arange(positions, device=key.device))

    def pattern_rows(self, positions: Tensor, keys: int) -> Tensor:
        """Rows of every head at these positions, over keys 0 .. keys: [heads, len(positions), keys]."""
        wide = self.log_sum_exp.dtype
        query = self.query[:, positions].to(wide).unflatten(0, (self.groups, -1))
        products = query @ self.key[:, None, :keys].to(wide).transpose(-1, -2)
        return self._pattern(products.flatten(0, 1), positions)

    def _pattern(self, products: Tensor, positions: Tensor) -> Tensor:
        """Rows of every head from the products of queries at these positions with keys."""
        logits = products * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        pattern = torch.exp(logits - self.normaliser[:, positions, None])
        return pattern.masked_fill_(_hidden(positions, products.shape[-1], self.window), 0)


def _hidden(positions: Tensor, keys: int, window: int) -> Tensor:
    """Mask of the keys that queries at these positions do not attend to: [len(positions), keys]."""
    behind = positions[:, None] - torch.arange(keys, device=positions.device)
    hidden = behind < 0
    if window:
        hidden |= behind >= window
    return hidden


Attention = StoredAttention | RecomputedAttention

SCRATCH_BYTES = 2 << 30  # recomputed patterns that a kernel writes out before it applies them
SCRATCH_COLUMNS = 128  # a multiple of these at a time, even where they take more


def scratch_columns(heads: int, positions: int) -> int:
    """Columns of a float32 pattern [heads, positions, positions] that are written out at a time."""
    blocks = SCRATCH_BYTES // (4 * heads * positions * SCRATCH_COLUMNS)
    return SCRATCH_COLUMNS * max(1, min(blocks, -(-positions // SCRATCH_COLUMNS)))
