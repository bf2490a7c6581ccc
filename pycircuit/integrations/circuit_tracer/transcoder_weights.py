"""circuit-tracer's transcoders as ours, on the same memory; what it leaves in files stays there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pycircuit.ops import Activation, FileRows, JumpReLU, ReLU, SparseFeatures, TopK
from pycircuit.transcoders import CrossLayerTranscoder, PerLayerTranscoders
from pycircuit.transcoders.formats.files import Stored, open_tensors
from pycircuit.transcoders.formats.hooks import READ_NAMES, WRITE_NAMES
from pycircuit.transcoders.lazy import Cache, LazyRows
from pycircuit.transcoders.types import Transcoders

from .generations import library

CACHE = 4 << 30  # bytes of decoder rows that are kept while their features are in use
RELUS = (nn.functional.relu, torch.relu)
_READS = {theirs: ours for ours, theirs in READ_NAMES.items()}
_WRITES = {theirs: ours for ours, theirs in WRITE_NAMES.items()}


def transcoders_of(model: Any) -> Transcoders:
    """The transcoders of their replacement model."""
    theirs = _unwrapped(model.transcoders)
    reads = _named("feature_input_hook", theirs.feature_input_hook, _READS)
    writes = _named("feature_output_hook", theirs.feature_output_hook, _WRITES)
    if hasattr(theirs, "transcoders"):
        return _per_layer(list(theirs.transcoders), reads, writes)
    if hasattr(theirs, "clt_path"):
        return _cross_layer(theirs, reads, writes)
    raise TypeError(
        "attribute: transcoders must be a circuit_tracer TranscoderSet or CrossLayerTranscoder, got "
        f"{type(theirs).__name__}"
    )


def _named(argument: str, hook: str, names: dict[str, str]) -> str:
    if hook not in names:
        raise ValueError(
            f"attribute: {argument} of the transcoders must be one of {', '.join(names)}, got {hook!r}, of which "
            "pycircuit does not know where in a layer it is"
        )
    return names[hook]


def activation(rule: Any, layer: int) -> Activation:
    """Their activation function. Of other libraries' some have the same names and another rule."""
    theirs, kind = library("transcoder.activation_functions"), type(rule)
    if kind is theirs.JumpReLU:
        theta = rule.threshold.detach()
        theta = (theta[layer] if theta.ndim == 3 else theta).reshape(-1)  # cross-layer: [layers, 1, features]
        return JumpReLU(float(theta) if theta.numel() == 1 else theta)
    if kind is theirs.TopK:
        return TopK(int(rule.k), keep_negative=True)
    if rule in RELUS or kind is nn.ReLU:
        return ReLU()
    raise TypeError(
        "attribute: activation_function must be ReLU, or circuit-tracer's JumpReLU or TopK, got "
        f"{kind.__module__}.{kind.__qualname__} in layer {layer}"
    )


def _per_layer(theirs: list[Any], reads: str, writes: str) -> Transcoders:
    cache = Cache(CACHE)
    w_enc, w_dec = [], []
    for one in theirs:
        stored = open_tensors(Path(one.transcoder_path)) if one.lazy_encoder or one.lazy_decoder else {}
        w_enc.append(_mapped(stored["W_enc"], one) if one.lazy_encoder else one.W_enc.detach())
        w_dec.append(_rows(stored["W_dec"], one, cache) if one.lazy_decoder else one.W_dec.detach())
    return PerLayerTranscoders(
        w_enc,
        [one.b_enc.detach() for one in theirs],
        w_dec,
        [one.b_dec.detach() for one in theirs],
        [activation(one.activation_function, at) for at, one in enumerate(theirs)],
        [None if one.W_skip is None else one.W_skip.detach().T for one in theirs],  # theirs is x @ W_skip.T
        reads,
        writes,
    )


def _cross_layer(theirs: Any, reads: str, writes: str) -> Transcoders:
    cache, layers = Cache(CACHE), range(theirs.n_layers)

    def stored(kind: str, at: int) -> Stored:
        name = f"{kind}_{at}"
        return open_tensors(Path(theirs.clt_path) / f"{name}.safetensors")[name]

    lazy_encoder, lazy_decoder = theirs.lazy_encoder, theirs.lazy_decoder
    return CrossLayerTranscoder(
        [_mapped(stored("W_enc", at), theirs) if lazy_encoder else theirs.W_enc[at].detach() for at in layers],
        [theirs.b_enc[at].detach() for at in layers],
        [_rows(stored("W_dec", at), theirs, cache) if lazy_decoder else theirs.W_dec[at].detach() for at in layers],
        [theirs.b_dec[at].detach() for at in layers],
        [activation(theirs.activation_function, at) for at in layers],
        None if theirs.W_skip is None else [theirs.W_skip[at].detach() for at in layers],
        reads,
        writes,
    )


def _mapped(stored: Stored, owner: Any) -> Tensor:
    """An encoder on its file's pages, unless their type cannot say what is stored there."""
    held = stored.mapped()
    exact = torch.promote_types(held.dtype, owner.dtype) == owner.dtype != torch.float64
    return held.to(device=owner.device, dtype=held.dtype if exact else owner.dtype)


def _rows(stored: Stored, owner: Any, cache: Cache) -> FileRows:
    return LazyRows.of([stored], False, owner.dtype, cache)


def ignored(model: Any, positions: int) -> int:
    """How many opening positions of a prompt get no features: their model keeps a slice."""
    zeroed = range(*model.zero_positions.indices(positions))
    if zeroed != range(len(zeroed)):
        raise ValueError(f"attribute: zero_positions must be the first ones, slice(0, n), got {model.zero_positions}")
    return len(zeroed)


def own_features(model: Any, x: Tensor, ignore: int) -> tuple[SparseFeatures, ...]:
    """Active features as their own encoder finds them, in the model's type. x: [layers, positions, width], in it.

    Which of two numbers in half precision is larger depends on how sums were rounded on the way to it.
    """
    theirs = _unwrapped(model.transcoders)
    return tuple(_sparse(theirs.encode_layer(x[layer], layer), ignore) for layer in range(len(x)))


def _sparse(dense: Tensor, ignore: int) -> SparseFeatures:
    """Activations that are not zero, past the first `ignore` positions. dense: [positions, features], changed."""
    dense[:ignore] = 0
    position, index = dense.nonzero(as_tuple=True)
    value = dense[position, index].float()
    if value.isnan().any():
        raise ValueError(
            "attribute: activations of the transcoders must not be NaN; look for NaN or inf in W_enc, b_enc"
        )
    counts = torch.bincount(position, minlength=len(dense)).cumsum(0)
    return SparseFeatures(torch.cat([counts.new_zeros(1), counts]), index, value)


def _unwrapped(transcoders: Any) -> Any:
    return getattr(transcoders, "_module", transcoders)  # nnsight wraps modules


def without_zeros(features: SparseFeatures) -> SparseFeatures:
    """The features whose activation is not zero: theirs go through a sparse tensor, which keeps no zero."""
    kept = features.value != 0
    if bool(kept.all()):
        return features
    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return SparseFeatures(before[features.row_ptr], features.index[kept], features.value[kept])
