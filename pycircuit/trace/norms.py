"""Transposes of frozen norms, by one kernel for all rows where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from pycircuit.model.frozen import FrozenNorm

from .precision import has_fused_kernels


@dataclass(frozen=True, eq=False)
class StackedNorms:
    """Norms of several layers without means and biases. gain: [layers, width]; sigma: [layers, positions]."""

    gain: Tensor
    sigma: Tensor

    def back(self, gradient: Tensor, layer: Tensor, position: Tensor) -> Tensor:
        """Return gradients before the norms from those after them: [rows, width]. layer, position: of each row."""
        cell = layer * self.sigma.shape[1] + position
        return _norm_back(gradient, self.gain, self.sigma, cell, layer)


def stacked(norms: Sequence[FrozenNorm | None]) -> StackedNorms | None:
    """Return norms for one kernel over rows of all layers, None where there is no such kernel for them."""
    gains, sigmas = [], []
    for norm in norms:
        if norm is None or norm.gain is None or norm.center or norm.bias is not None:
            return None
        gains.append(norm.gain)
        sigmas.append(norm.sigma)
    return StackedNorms(torch.stack(gains), torch.stack(sigmas)) if has_fused_kernels(sigmas[0]) else None


def norm_back(norm: FrozenNorm, gradient: Tensor, position: Tensor) -> Tensor:
    """Return gradients before a norm from those after it: [rows, width]. position: of each row."""
    if norm.center or not has_fused_kernels(gradient):
        return norm.back(gradient, position)
    return _norm_back(gradient, norm.gain, norm.sigma, position, None)


def _norm_back(gradient: Tensor, gain: Tensor | None, sigma: Tensor, cell: Tensor, gain_row: Tensor | None) -> Tensor:
    back: Tensor = import_module("pycircuit.kernels.norm_back").norm_back(gradient, gain, sigma, cell, gain_row)
    return back
