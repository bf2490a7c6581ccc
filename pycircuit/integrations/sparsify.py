"""sparsify's SparseCoder on pycircuit's operations, as a transcoder or an autoencoder, with or without a skip.

    with sparsify.accelerate(coder):  # or handle = accelerate(coder) ... handle.undo()
        out = coder(x, y)

Results and gradients are those of sparsify, up to the order of sums and of a token's latents, which sparsify leaves
open; here they ascend. `pre_acts` are computed on first use; weights changed through `.data` before that are not
noticed. Under autocast sums stay in the weights' dtype. NaN is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.ops import TopK
from pycircuit.training import sparse
from pycircuit.training.sparse import Entries

from .handle import Accelerated, rows_together


def accelerate(coder: Any) -> Accelerated:
    """Replace encode and decode of a coder, and with them its forward, until `undo()` or the end of a `with`."""
    _check("accelerate", coder)
    return Accelerated(coder, {"encode": encode, "decode": decode})


def encode(coder: Any, x: Tensor) -> Any:
    """Result of `coder.encode(x)`: an EncoderOutput of top_acts, top_indices [..., k] and pre_acts. x: [..., d_in].

    If fewer than k latents are positive, the least negative ones fill up with zeros. As in sparsify gradients reach
    those too, and none comes through pre_acts.
    """
    module = _check("encode", coder)
    x = x if coder.cfg.transcode else x - coder.b_dec
    weight, bias, k = coder.encoder.weight, coder.encoder.bias, coder.cfg.k
    if not 1 <= k <= len(weight):
        raise ValueError(f"encode: cfg.k must be from 1 to the {len(weight)} latents, got {k}")
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    w_enc, b_enc = rows_together(weight), bias.contiguous()
    with torch.no_grad():
        entries = Entries.of(ops.encode(flat, w_enc, b_enc, TopK(k, keep_negative=True)), len(weight))
    values = sparse.values(flat, w_enc, b_enc, entries)
    values = values + (values.clamp_min(0.0) - values).detach()  # zero, with their gradient
    shape = (*x.shape[:-1], k)
    pre_acts = _LazyPreActivations.from_operands(x.detach(), weight.detach(), bias.detach())
    index = entries.index.clone()  # the caller may change it before the backward pass
    return module.EncoderOutput(values.to(weight.dtype).view(shape), index.view(shape), pre_acts)


def decode(coder: Any, top_acts: Tensor, top_indices: Tensor) -> Tensor:
    """Result of `coder.decode(top_acts, top_indices)`: [..., d_in]. Both: [..., k], latents in any order."""
    _check("decode", coder)
    if coder.W_dec is None:
        raise ValueError("decode: coder must have a decoder, got W_dec=None; load it with decoder=True")
    if top_acts.shape != top_indices.shape or top_acts.ndim == 0:
        got = f"{list(top_acts.shape)} and {list(top_indices.shape)}"
        raise ValueError(f"decode: top_acts and top_indices must have one shape [..., k], got {got}")
    shape, dtype = top_acts.shape, coder.W_dec.dtype
    row_ptr = torch.arange(shape[:-1].numel() + 1, device=top_acts.device) * shape[-1]
    value = top_acts.to(dtype).reshape(-1)
    value = value if dtype == torch.float64 else value.float()
    index = top_indices.detach().long().reshape(-1)
    if index.data_ptr() == top_indices.data_ptr():
        index = index.clone()  # the caller may change it before the backward pass
    entries = Entries(row_ptr, index, value.detach(), len(coder.W_dec))
    written = sparse.decode(value, rows_together(coder.W_dec)[None], entries)[0]
    return (written + coder.b_dec).to(dtype).view(*shape[:-1], written.shape[-1])


def _check(op: str, coder: Any) -> Any:
    """sparsify's module of sparse coders."""
    try:
        module = import_module("sparsify.sparse_coder")
    except ImportError as error:
        raise ImportError(f"{op}: eai-sparsify must be installed, got {error}; pip install eai-sparsify") from None
    if type(coder) is not module.SparseCoder:
        raise TypeError(f"{op}: coder must be sparsify's SparseCoder, got {type(coder).__name__}")
    if coder.cfg.activation != "topk":
        raise ValueError(f"{op}: cfg.activation must be topk, got {coder.cfg.activation!r}, which pycircuit lacks")
    return module


class _LazyPreActivations(Tensor):
    """Pre-activations relu(x @ weight.T + bias), computed on first use."""

    _operands: tuple[Tensor, Tensor, Tensor]
    _expected_versions: list[int]
    _value: Tensor | None = None

    @classmethod
    def from_operands(cls, x: Tensor, weight: Tensor, bias: Tensor) -> _LazyPreActivations:
        lazy = torch.empty(0, device="meta").as_subclass(cls)
        lazy._operands = (x, weight, bias)
        lazy._expected_versions = _tensor_versions(lazy._operands)
        return lazy

    def _materialize(self) -> Tensor:
        if self._value is None:
            if self._expected_versions != _tensor_versions(self._operands):
                raise ValueError("encode: pre_acts must be looked at before x or the weights change, got a change")
            self._value = torch.relu(torch.nn.functional.linear(*self._operands))
        return self._value

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*_materialize(args), **_materialize(kwargs or {}))


def _tensor_versions(tensors: Sequence[Tensor]) -> list[int]:
    """Number of writes to each tensor; in inference mode torch does not count."""
    return [0 if t.is_inference() else t._version for t in tensors]


def _materialize(value: Any) -> Any:
    """Compute every lazy tensor in a nested value."""
    if isinstance(value, _LazyPreActivations):
        return value._materialize()
    if isinstance(value, dict):
        return {key: _materialize(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_materialize(inner) for inner in value)
    return value
