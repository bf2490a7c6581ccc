"""Conversion of circuit-tracer's transcoders to pycircuit's, on the same memory; lazy weights stay in their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pycircuit.ops import Activation, FileRows, JumpReLU, ReLU, SparseFeatures, TopK
from pycircuit.transcoders import CrossLayerTranscoder, PerLayerTranscoders
from pycircuit.transcoders.formats.hooks import READ_NAMES, WRITE_NAMES, Stream
from pycircuit.transcoders.formats.stored_tensors import StoredTensor, open_tensors
from pycircuit.transcoders.lazy import LazyRows, RowCache
from pycircuit.transcoders.types import Reads, Transcoders, Writes

from .generations import library

CACHE = 4 << 30  # bytes of decoder rows
RELU_FUNCTIONS = (nn.functional.relu, torch.relu)
_READS = {theirs: ours for ours, theirs in READ_NAMES.items()}
_WRITES = {theirs: ours for ours, theirs in WRITE_NAMES.items()}


def transcoders_of(model: Any) -> Transcoders:
    """Convert the transcoders of a circuit-tracer replacement model."""
    transcoders = _unwrapped(model.transcoders)
    reads = _our_name("feature_input_hook", transcoders.feature_input_hook, _READS)
    writes = _our_name("feature_output_hook", transcoders.feature_output_hook, _WRITES)
    if hasattr(transcoders, "transcoders"):
        return _per_layer(list(transcoders.transcoders), reads, writes)
    if hasattr(transcoders, "clt_path"):
        return _cross_layer(transcoders, reads, writes)
    raise TypeError(
        "attribute: transcoders must be a circuit_tracer TranscoderSet or CrossLayerTranscoder, got "
        f"{type(transcoders).__name__}"
    )


def _our_name(argument: str, hook: str, names: Mapping[Any, Stream]) -> Stream:
    if hook not in names:
        raise ValueError(
            f"attribute: {argument} of the transcoders must be one of {', '.join(names)}, got {hook!r}, of which "
            "pycircuit does not know where in a layer it is"
        )
    return names[hook]


def activation(rule: Any, layer: int) -> Activation:
    """Convert a circuit-tracer activation function; classes of other libraries with the same names are rejected."""
    library_module, rule_type = library("transcoder.activation_functions"), type(rule)
    if rule_type is library_module.JumpReLU:
        threshold = rule.threshold.detach()
        if threshold.ndim == 3:  # cross-layer: [layers, 1, features]
            threshold = threshold[layer]
        threshold = threshold.reshape(-1)
        return JumpReLU(float(threshold) if threshold.numel() == 1 else threshold)
    if rule_type is library_module.TopK:
        return TopK(int(rule.k), keep_negative=True)
    if rule in RELU_FUNCTIONS or rule_type is nn.ReLU:
        return ReLU()
    raise TypeError(
        "attribute: activation_function must be ReLU, or circuit-tracer's JumpReLU or TopK, got "
        f"{rule_type.__module__}.{rule_type.__qualname__} in layer {layer}"
    )


def _per_layer(transcoders: list[Any], reads: Reads, writes: Writes) -> Transcoders:
    cache = RowCache(CACHE)
    w_enc, w_dec = [], []
    for transcoder in transcoders:
        lazy = transcoder.lazy_encoder or transcoder.lazy_decoder
        tensors = open_tensors(Path(transcoder.transcoder_path)) if lazy else {}
        w_enc.append(_mapped(tensors["W_enc"], transcoder) if transcoder.lazy_encoder else transcoder.W_enc.detach())
        w_dec.append(
            _rows(tensors["W_dec"], transcoder, cache) if transcoder.lazy_decoder else transcoder.W_dec.detach()
        )
    return PerLayerTranscoders(
        w_enc,
        [transcoder.b_enc.detach() for transcoder in transcoders],
        w_dec,
        [transcoder.b_dec.detach() for transcoder in transcoders],
        [activation(transcoder.activation_function, layer) for layer, transcoder in enumerate(transcoders)],
        # circuit-tracer computes x @ W_skip.T
        [None if transcoder.W_skip is None else transcoder.W_skip.detach().T for transcoder in transcoders],
        reads,
        writes,
    )


def _cross_layer(transcoder: Any, reads: Reads, writes: Writes) -> Transcoders:
    cache, layers = RowCache(CACHE), range(transcoder.n_layers)

    def stored(kind: str, layer: int) -> StoredTensor:
        name = f"{kind}_{layer}"
        return open_tensors(Path(transcoder.clt_path) / f"{name}.safetensors")[name]

    def encoder(layer: int) -> Tensor:
        if transcoder.lazy_encoder:
            return _mapped(stored("W_enc", layer), transcoder)
        weight: Tensor = transcoder.W_enc[layer].detach()
        return weight

    def decoder(layer: int) -> Tensor | FileRows:
        if transcoder.lazy_decoder:
            return _rows(stored("W_dec", layer), transcoder, cache)
        weight: Tensor = transcoder.W_dec[layer].detach()
        return weight

    return CrossLayerTranscoder(
        [encoder(layer) for layer in layers],
        [transcoder.b_enc[layer].detach() for layer in layers],
        [decoder(layer) for layer in layers],
        [transcoder.b_dec[layer].detach() for layer in layers],
        [activation(transcoder.activation_function, layer) for layer in layers],
        None if transcoder.W_skip is None else [transcoder.W_skip[layer].detach() for layer in layers],
        reads,
        writes,
    )


def _mapped(stored: StoredTensor, owner: Any) -> Tensor:
    """Map an encoder from its file, unless the owner's dtype cannot represent the stored one."""
    mapped = stored.mapped()
    exact = torch.promote_types(mapped.dtype, owner.dtype) == owner.dtype != torch.float64
    return mapped.to(device=owner.device, dtype=mapped.dtype if exact else owner.dtype)


def _rows(stored: StoredTensor, owner: Any, cache: RowCache) -> FileRows:
    return LazyRows.of([stored], False, owner.dtype, cache)


def ignored(model: Any, positions: int) -> int:
    """Number of opening positions of a prompt without features, from the model's slice `zero_positions`."""
    zeroed = range(*model.zero_positions.indices(positions))
    if zeroed != range(len(zeroed)):
        raise ValueError(f"attribute: zero_positions must be the first ones, slice(0, n), got {model.zero_positions}")
    return len(zeroed)


def own_features(model: Any, x: Tensor, ignore: int) -> tuple[SparseFeatures, ...]:
    """Active features by circuit-tracer's encoder, in the model's dtype. x: [layers, positions, width].

    In half precision the rounding of sums decides which features are active, so pycircuit's encoder could differ.
    """
    transcoders = _unwrapped(model.transcoders)
    return tuple(_sparse(transcoders.encode_layer(x[layer], layer), ignore) for layer in range(len(x)))


def _sparse(dense: Tensor, ignore: int) -> SparseFeatures:
    """Nonzero activations past the first `ignore` positions. dense: [positions, features], overwritten there."""
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
    """Features with nonzero activation: circuit-tracer's go through a sparse tensor, which has no zeros."""
    nonzero = features.value != 0
    if bool(nonzero.all()):
        return features
    before = torch.cat([nonzero.new_zeros(1, dtype=torch.int64), nonzero.cumsum(0)])
    return SparseFeatures(before[features.row_ptr], features.index[nonzero], features.value[nonzero])
