"""SAELens transcoders on our operations: its Transcoder, SkipTranscoder and their JumpReLU forms.

    with sae_lens.accelerate(transcoder):  # or handle = accelerate(transcoder) ... handle.undo()
        written = transcoder(x)

Results and gradients are those of SAELens, up to the order of sums; the positions x features matrix is made only by
what returns it, or by a hook that looks at it: with one on pre-activations SAELens's own encoder runs, which makes
them. Under autocast sums stay in the weights' type. NaN is an error.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pycircuit import ops
from pycircuit.ops import Features, JumpReLU, ReLU
from pycircuit.train import sparse
from pycircuit.train.sparse import Entries

from .handle import Accelerated, rows_together

KINDS = ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder")


def accelerate(transcoder: Any) -> Accelerated:
    """Its encode, decode, forward and forward_with_activations run ours, in place, until `undo()` or a `with` ends.

    An encoder that is not trained (`requires_grad_(False)`) lies feature by feature in the meantime, the same parameter
    with the same values. One that is stays as it is, as an optimizer's state does, and is copied at every call.
    """
    _check("accelerate", transcoder)
    methods = (encode, decode, forward, forward_with_activations, process_state_dict_for_saving)
    w_enc = transcoder.W_enc
    by_feature = None if w_enc.requires_grad or w_enc.is_inference() else w_enc.data.T.contiguous().T
    whole = w_enc.is_contiguous()

    def restore() -> None:
        if by_feature is not None and whole:
            transcoder.W_enc.data = transcoder.W_enc.data.contiguous()

    handle = Accelerated(transcoder, {f.__name__: f for f in methods}, restore)
    if by_feature is not None:
        w_enc.data = by_feature
    return handle


def process_state_dict_for_saving(transcoder: Any, state_dict: dict[str, Any]) -> None:
    """Files of tensors want each in one piece."""
    type(transcoder).process_state_dict_for_saving(transcoder, state_dict)
    state_dict.update({name: t.contiguous() for name, t in state_dict.items()})


def encode(transcoder: Any, x: Tensor) -> Tensor:
    """What `transcoder.encode(x)` returns: [..., features]. x: [..., d_in]."""
    _check("encode", transcoder)
    if not _idle(transcoder.hook_sae_acts_pre):
        seen: Tensor = type(transcoder).encode(transcoder, x)
        return seen
    entries, values, shape = _found(transcoder, x)
    dense = Features(entries.row_ptr, entries.index, values).dense(entries.size).to(transcoder.W_enc.dtype)
    acts: Tensor = transcoder.hook_sae_acts_post(dense.view(*shape, entries.size))
    return acts


def decode(transcoder: Any, feature_acts: Tensor) -> Tensor:
    """What `transcoder.decode(feature_acts)` returns: [..., d_out]. feature_acts: [..., features], mostly zeros.

    Its gradient is that of every entry, those that are zero included.
    """
    _check("decode", transcoder)
    w_dec = transcoder.W_dec
    if feature_acts.shape[-1:] != w_dec.shape[:1]:
        rule = f"end with the {len(w_dec)} features of W_dec"
        raise ValueError(f"decode: feature_acts must {rule}, got shape {list(feature_acts.shape)}")
    flat = _DecodeDense.apply(feature_acts.reshape(-1, len(w_dec)), rows_together(w_dec))
    return _finished(transcoder, flat, tuple(feature_acts.shape[:-1]))


def forward(transcoder: Any, x: Tensor) -> Tensor:
    """What `transcoder(x)` returns: [..., d_out]. The activations are made only for a hook that looks at them."""
    _check("forward", transcoder)
    if not (_idle(transcoder.hook_sae_acts_pre) and _idle(transcoder.hook_sae_acts_post)):
        return forward_with_activations(transcoder, x)[0]
    entries, values, shape = _found(transcoder, x)
    written = sparse.decode(values, rows_together(transcoder.W_dec)[None], entries)[0]
    return _with_skip(transcoder, x, _finished(transcoder, written, shape))


def forward_with_activations(transcoder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `transcoder.forward_with_activations(x)` returns: [..., d_out] and [..., features]."""
    acts = encode(transcoder, x)
    return _with_skip(transcoder, x, decode(transcoder, acts)), acts


def _check(op: str, transcoder: Any) -> None:
    try:
        theirs = import_module("sae_lens.saes.transcoder")
    except ImportError as error:
        raise ImportError(f"{op}: sae-lens must be installed, got {error}; pip install sae-lens") from None
    if type(transcoder) not in [getattr(theirs, name) for name in KINDS]:
        known, got = ", ".join(KINDS), type(transcoder).__name__
        raise TypeError(f"{op}: transcoder must be one of SAELens's {known}, got {got}")
    act = transcoder.activation_fn
    if type(act) is not torch.nn.ReLU or _hooked(act):
        got = f"{type(act).__name__} with a hook" if type(act) is torch.nn.ReLU else type(act).__name__
        raise ValueError(f"{op}: transcoder.activation_fn must be the ReLU that SAELens gives it, got {got}")


def _hooked(point: Any) -> bool:
    return bool(point._forward_pre_hooks or point._forward_hooks or point._backward_pre_hooks or point._backward_hooks)


def _idle(point: Any) -> bool:
    """Whether nothing happens there: SAELens puts an Identity where it disables a hook, users put what they like."""
    return type(point).__name__ in ("HookPoint", "Identity") and not _hooked(point)


def _found(transcoder: Any, x: Tensor) -> tuple[Entries, Tensor, tuple[int, ...]]:
    """(active entries, their values with gradients: [n], the shape before features)."""
    x = transcoder.process_sae_in(x)
    flat, b_enc = x.reshape(-1, x.shape[-1]).contiguous(), transcoder.b_enc.contiguous()
    w_enc, theta = rows_together(transcoder.W_enc.T), getattr(transcoder, "threshold", None)
    rule = ReLU() if theta is None else JumpReLU(theta.detach().clamp_min(0.0))  # theirs comes after a ReLU
    with torch.no_grad():
        entries = Entries.of(ops.encode(flat, w_enc, b_enc, rule), len(w_enc))
    return entries, sparse.values(flat, w_enc, b_enc, entries), tuple(x.shape[:-1])


def _finished(transcoder: Any, written: Tensor, shape: tuple[int, ...]) -> Tensor:
    """written: [positions, d_out]; with the bias, in their type and shape."""
    out = (written + transcoder.b_dec).to(transcoder.W_dec.dtype).view(*shape, written.shape[-1])
    seen: Tensor = transcoder.hook_sae_recons(out)
    return seen


def _with_skip(transcoder: Any, x: Tensor, written: Tensor) -> Tensor:
    w_skip = getattr(transcoder, "W_skip", None)
    if w_skip is None:
        return written
    skip: Tensor = x @ w_skip.T.to(x.device)
    return written + skip


class _DecodeDense(torch.autograd.Function):
    """acts [positions, features] @ w_dec [features, width] over the entries that are not zero."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, w_dec: Tensor) -> Tensor:
        entries = _entries(acts)
        ctx.entries = entries
        ctx.save_for_backward(w_dec)
        return ops.decode(entries.at_positions(entries.pre), w_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (w_dec,), entries, grad = ctx.saved_tensors, ctx.entries, grads[0].contiguous()
        grad_acts = grad.to(w_dec.dtype) @ w_dec.T if ctx.needs_input_grad[0] else None
        grad_w = ops.decode(entries.at_features(entries.pre), grad) if ctx.needs_input_grad[1] else None
        return grad_acts, grad_w


def _entries(acts: Tensor) -> Entries:
    position, index = acts.nonzero(as_tuple=True)
    row_ptr = position.new_zeros(len(acts) + 1)
    row_ptr[1:] = torch.bincount(position, minlength=len(acts)).cumsum(0)
    value = acts[position, index]
    return Entries(row_ptr, index, value if value.dtype == torch.float64 else value.float(), acts.shape[1])
