"""Training step of per-layer TopK transcoders, one layer at a time, by two native kernels and without autograd.

A layer's weights and Adam's moments pass memory once, and no gradient of a weight is written:

    y = y - x @ w_skip                                               where there is a linear path
    features = encode(x)                                             the product, and the k largest
    error, value_gradient = reconstruct(features, w_dec, y)          decoder rows read twice, the second time in cache
    adam(w_dec, value, error); adam(w_enc, value_gradient, x)        a row's gradient is made in cache and used at once

Rows without an active feature have a gradient of zero, by which Adam still moves them: every row is updated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycircuit import _native
from pycircuit.ops import SparseFeatures, native

from .learner import Learner
from .sparse import Entries


@dataclass(frozen=True, eq=False)
class LayerStep:
    """Result of one layer's step. gradient: [positions, width], of the reconstruction, the error times `scale`.

    squares: [2] float64, the sums of squares of the error and of y.
    """

    entries: Entries
    gradient: Tensor
    squares: Tensor


class FusedStep:
    """Steps of a learner, layer by layer. Adam's moments are those of `adam`, so that its state is torch's."""

    def __init__(self, learner: Learner, adam: torch.optim.Adam) -> None:
        self.learner, self.adam = learner, adam
        self.step = 0

    def start(self, step: int, rate: float) -> None:
        """Begin a step, counted from 0, with a learning rate."""
        self.step = step + 1
        self.adam.param_groups[0]["lr"] = rate

    def layer(self, layer: int, x: Tensor, y: Tensor, scale: float) -> LayerStep:
        """Take the step of one layer. x, y: [positions, width]; scale: of the error in the loss's gradient."""
        learner = self.learner
        entries = learner.entries(layer, x, None)
        w_dec, bias = learner.w_dec[layer][0], learner.b_dec[layer]
        target = y
        if learner.w_skip:
            target = y - x @ learner.w_skip[layer].detach()
        gradient, value_gradient = torch.empty_like(y), torch.empty_like(entries.pre)
        squares = y.new_empty(len(y), 2)
        _native.reconstruct(
            native.isa_index(),
            _sparse(entries.at_positions(entries.pre)),
            w_dec.data_ptr(),
            w_dec.stride(0),
            w_dec.shape[1],
            bias.data_ptr(),
            target.data_ptr(),
            target.stride(0),
            scale,
            gradient.data_ptr(),
            value_gradient.data_ptr(),
            squares.data_ptr(),
            torch.get_num_threads(),
        )
        self._update(learner.w_dec[layer], entries.at_features(entries.pre), gradient)
        self._update(learner.w_enc[layer], entries.at_features(value_gradient), x)
        self._update_dense(learner.b_enc[layer], entries.per_feature(value_gradient))
        sums = squares.double().sum(0)
        if learner.w_skip:
            self._update_dense(learner.w_skip[layer], x.T @ gradient)
            sums[1] = y.double().square().sum()
        return LayerStep(entries, gradient, sums)

    def biases(self, gradient: Tensor) -> None:
        """Update the decoders' biases, whose gradient is [layers, width], after the last layer."""
        self._update_dense(self.learner.b_dec, gradient)

    def _update_dense(self, parameter: Tensor, gradient: Tensor) -> None:
        """Update a parameter by a gradient of its shape: each row's is the sum of one row."""
        rows = gradient.contiguous().view(-1, gradient.shape[-1])
        every = torch.arange(len(rows) + 1)
        self._update(parameter, SparseFeatures(every, every[:-1], torch.ones(len(rows))), rows)

    def _update(self, parameter: Tensor, gradient: SparseFeatures, source: Tensor) -> None:
        """Update rows [rows, width], whose gradients are sums of value * source[index] over their entries."""
        state = self.adam.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"].fill_(self.step)
        group = self.adam.param_groups[0]
        mean_decay, square_decay = group["betas"]
        _native.adam(
            native.isa_index(),
            parameter.data_ptr(),
            state["exp_avg"].data_ptr(),
            state["exp_avg_sq"].data_ptr(),
            _sparse(gradient),
            source.data_ptr(),
            source.stride(0),
            source.shape[1],
            group["lr"] / (1 - mean_decay**self.step),
            1 - mean_decay,
            1 - square_decay,
            (1 - square_decay**self.step) ** 0.5,
            group["eps"],
            torch.get_num_threads(),
        )


def _sparse(f: SparseFeatures) -> tuple[int, int, int, int]:
    return f.row_ptr.data_ptr(), f.index.data_ptr(), f.value.data_ptr(), f.positions
