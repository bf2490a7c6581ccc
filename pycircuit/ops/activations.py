"""Activation rules: `active(pre)` masks the pre-activations of active features.

An active feature's value is its pre-activation, so every rule is only a mask. A NaN pre-activation is
active under every rule: it must be seen, never silently dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReLU:
    """Active above zero."""

    def active(self, pre: Tensor) -> Tensor:
        return ~(pre <= 0)


@dataclass(frozen=True, eq=False)
class JumpReLU:
    """Active above the feature's own threshold: theta is [features], or one number for all."""

    theta: Tensor | float

    def active(self, pre: Tensor) -> Tensor:
        return ~(pre <= self.theta)


@dataclass(frozen=True)
class BatchTopK:
    """BatchTopK at inference: active above the single threshold from training."""

    threshold: float

    def active(self, pre: Tensor) -> Tensor:
        return ~(pre <= max(self.threshold, 0.0))


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of a position; ties go to the lower index.

    Non-positive ones are silent, as after a ReLU, unless keep_negative.
    """

    k: int
    keep_negative: bool = False

    def active(self, pre: Tensor) -> Tensor:
        if self.k >= pre.shape[-1]:
            mask = torch.ones_like(pre, dtype=torch.bool)
        else:
            last = pre.topk(self.k).values[..., -1:]
            mask = ~(pre < last)
            if int(mask.sum()) > self.k * pre.shape[:-1].numel():  # ties at the last place
                above, tied = ~(pre <= last), pre == last
                mask = above | (tied & (tied.cumsum(-1) <= self.k - above.sum(-1, keepdim=True)))
        return mask if self.keep_negative else mask & ~(pre <= 0)


Activation = ReLU | JumpReLU | BatchTopK | TopK
