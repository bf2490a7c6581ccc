"""Linear layers of a model's forward, multiplied by the fastest provider of products."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pycircuit.ops.products import product, provider_of


class FastLinearLayers(TorchFunctionMode):
    """Context in which linear layers without gradients use `product` where torch's own is not the fastest.

    Under autocast, which decides the type of a product, all are torch's.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_autocast_enabled("cpu"):
            return function(*args, **(kwargs or {}))
        if function is functional.linear:
            return _linear(*args, **(kwargs or {}))
        if function is torch.addmm and not kwargs:
            return _addmm(*args)
        return function(*args, **(kwargs or {}))


def fast_linear_layers(device: torch.device) -> AbstractContextManager[Any]:
    """Return that context for a CPU. A GPU has one provider, and every call in the context takes its host time."""
    return FastLinearLayers() if device.type == "cpu" else nullcontext()


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # torch's own names
    rows, columns = input.flatten(0, -2) if input.ndim > 1 else input, weight.T
    if rows.ndim < 2 or provider_of(rows, columns) == "torch":
        return functional.linear(input, weight, bias)
    out = product(rows, columns)
    if bias is not None:
        out += bias
    return out.view(*input.shape[:-1], len(weight))


def _addmm(bias: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """GPT-2's linear layer, whose weight is not transposed."""
    if provider_of(rows, weight) == "torch":
        return torch.addmm(bias, rows, weight)
    out = product(rows, weight)
    out += bias
    return out
