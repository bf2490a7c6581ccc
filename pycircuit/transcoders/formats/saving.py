"""Transcoders to files, a layer at a time: from memory, or out of files of another format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycircuit.files.atomic_folder import write_folder
from pycircuit.ops import Activation, BatchTopK, JumpReLU, TopK
from pycircuit.transcoders.types import CrossLayerTranscoder, Reads, Transcoders, Writes

from . import hooks
from .config_files import activation_config
from .contents import Contents
from .reader import LayerReader

LAYOUTS = ("circuit-tracer", "pycircuit", "saelens")
_SAELENS = "6.0.0"  # version of the configuration; without it SAELens takes it for an older one

Files = dict[str, dict[str, Any]]  # tensors by file and by name


class Weights(NamedTuple):
    """One layer as transcoders hold it; w_dec may be in a file."""

    w_enc: Tensor | None
    b_enc: Tensor | None
    w_dec: Any
    b_dec: Tensor | None
    rule: Activation
    w_skip: Tensor | None


@dataclass(frozen=True)
class TranscoderSet:
    """A set to be written. sizes: features of each layer, None without a transcoder; weights(layer): read on demand."""

    cross: bool
    reads: Reads
    writes: Writes
    sizes: list[int | None]
    rules: list[Activation]
    weights: Callable[[int], Weights]


def set_in_memory(t: Transcoders) -> TranscoderSet:
    """The set of transcoders in memory."""

    def weights(layer: int) -> Weights:
        return Weights(
            t.w_enc[layer], t.b_enc[layer], t.w_dec[layer], t.b_dec[layer], t.activation[layer], t.w_skip[layer]
        )

    sizes = [None if w is None else w.shape[0] for w in t.w_enc]
    return TranscoderSet(isinstance(t, CrossLayerTranscoder), t.reads, t.writes, sizes, t.activation, weights)


def set_in_files(contents: Contents, dtype: torch.dtype | None) -> TranscoderSet:
    """The set of transcoders in files; each layer is read when it is written."""

    def weights(layer: int) -> Weights:
        reader = LayerReader(contents.layers[layer], None, dtype, True)
        return Weights(reader.w_enc(), reader.b_enc(), reader.w_dec(), reader.b_dec(), reader.rule(), reader.w_skip())

    sizes = [layer.size for layer in contents.layers]
    rules = [layer.rule if layer.theta is None else JumpReLU(0.0) for layer in contents.layers]
    return TranscoderSet(contents.cross, contents.reads, contents.writes, sizes, rules, weights)


def write(
    op: str,
    transcoders: TranscoderSet,
    folder: Path,
    to: str,
    model: str | None,
    scan: str | None,
    key: dict[str, Any] | None,
) -> None:
    """Write a new folder. key: what it is made of, to go on after a broken run."""
    texts: dict[str, str] = {}
    if to == "saelens":
        _check_saelens(transcoders)
    else:
        texts["config.yaml"] = _config(transcoders, folder, model, scan)
    write_folder(op, folder, _files(transcoders, to, model, texts), texts, key)


def _files(
    transcoders: TranscoderSet, to: str, model: str | None, texts: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and tensors of every file; configurations of a layer are added to texts."""
    for layer in range(len(transcoders.sizes)):
        weights = transcoders.weights(layer)
        if to == "saelens":
            files, config = _saelens_files(weights, layer, transcoders, model)
            if config is not None:
                texts[f"layer_{layer}/cfg.json"] = json.dumps(config, indent=1)
        elif transcoders.cross:
            files = _cross_layer_files(weights, layer)
        else:
            files = _per_layer_files(weights, layer)
        yield from files.items()


def _present(**tensors: Any) -> dict[str, Any]:
    return {name: t for name, t in tensors.items() if t is not None}


def _transposed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.T


def _per_layer_files(weights: Weights, layer: int) -> Files:
    tensors = _present(
        W_enc=weights.w_enc,
        W_dec=weights.w_dec,
        b_enc=weights.b_enc,
        b_dec=_bias(weights),
        W_skip=_transposed(weights.w_skip),
    )
    theta = _thresholds(weights)
    if theta is not None:
        tensors["activation_function.threshold"] = theta
    return {f"layer_{layer}.safetensors": tensors} if tensors else {}


def _cross_layer_files(weights: Weights, layer: int) -> Files:
    tensors = _present(
        W_enc=weights.w_enc,
        b_enc=weights.b_enc,
        b_dec=_bias(weights),
        threshold=_thresholds(weights),
        W_skip=weights.w_skip,
    )
    files: Files = {}
    if tensors:
        files[f"W_enc_{layer}.safetensors"] = {f"{name}_{layer}": t for name, t in tensors.items()}
    if weights.w_dec is not None:
        files[f"W_dec_{layer}.safetensors"] = {f"W_dec_{layer}": weights.w_dec}
    return files


def _bias(weights: Weights) -> Tensor | None:
    """b_dec, or zeros for an encoder without one: other libraries want it."""
    if weights.b_dec is None and weights.w_enc is not None:
        return weights.w_enc.new_zeros(weights.w_enc.shape[1])
    return weights.b_dec


def _thresholds(weights: Weights) -> Tensor | None:
    """[F], where the rule has any; a BatchTopK is a JumpReLU with one threshold for all."""
    rule = weights.rule
    if weights.w_enc is None or not isinstance(rule, JumpReLU | BatchTopK):
        return None
    wide = torch.float64 if weights.w_enc.dtype == torch.float64 else torch.float32
    theta = rule.theta if isinstance(rule, JumpReLU) else max(rule.threshold, 0.0)
    if not isinstance(theta, Tensor):
        theta = torch.tensor(float(theta), dtype=wide)
    return theta.expand(weights.w_enc.shape[0]) if theta.numel() == 1 else theta


def _config(transcoders: TranscoderSet, folder: Path, model: str | None, scan: str | None) -> str:
    """Text of config.yaml, with what only we read under our own name."""
    import yaml

    rules = [activation_config(rule) for rule in transcoders.rules]
    own = {
        "layers": len(transcoders.sizes),
        "features": transcoders.sizes,
        "reads": transcoders.reads,
        "writes": transcoders.writes,
        "activation": rules[0] if all(r == rules[0] for r in rules) else rules,
    }
    config = {
        "model_name": model,
        "model_kind": "cross_layer_transcoder" if transcoders.cross else "transcoder_set",
        "feature_input_hook": hooks.READ_NAMES[transcoders.reads],
        "feature_output_hook": hooks.WRITE_NAMES[transcoders.writes],
        "scan": folder.name if scan is None else scan,
        **_common_top_k(transcoders),
        "pycircuit": own,
    }
    return yaml.safe_dump({name: value for name, value in config.items() if value is not None}, sort_keys=False)


def _common_top_k(transcoders: TranscoderSet) -> dict[str, Any]:
    """Entries of a TopK as circuit-tracer reads them, where all layers have the same one."""
    sized = zip(transcoders.sizes, transcoders.rules, strict=True)
    rules = [rule for size, rule in sized if size is not None]
    first = rules[0] if rules else None
    return {"activation": "topk", "k": first.k} if isinstance(first, TopK) and all(r == first for r in rules) else {}


def _check_saelens(transcoders: TranscoderSet) -> None:
    if transcoders.cross:
        raise ValueError("convert: to must be circuit-tracer or pycircuit for a cross-layer transcoder, got saelens")
    if any(isinstance(rule, TopK) for rule in transcoders.rules):
        raise ValueError(
            "convert: to must be circuit-tracer or pycircuit for a TopK, which SAELens has none, got saelens"
        )


def _saelens_files(
    weights: Weights, layer: int, transcoders: TranscoderSet, model: str | None
) -> tuple[Files, dict[str, Any] | None]:
    """Files of a layer, and its cfg.json; {} and None without a transcoder."""
    if weights.w_enc is None:
        return {}, None
    theta = _thresholds(weights)
    if theta is not None and bool((theta < 0).any()):
        raise ValueError(f"convert: thresholds must not be negative for saelens, got some in layer {layer}")
    tensors = _present(
        W_enc=_transposed(weights.w_enc),
        W_dec=weights.w_dec,
        b_enc=weights.b_enc,
        b_dec=_bias(weights),
        threshold=theta,
        W_skip=_transposed(weights.w_skip),
    )
    size, width = weights.w_enc.shape
    hook_in, hook_out = hooks.READ_NAMES[transcoders.reads], hooks.WRITE_NAMES[transcoders.writes]
    config = {
        "architecture": "jumprelu_" * (theta is not None) + "skip_" * (weights.w_skip is not None) + "transcoder",
        "d_in": width,
        "d_sae": size,
        "d_out": width,
        "dtype": str(weights.w_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": model,
            "hook_name": f"blocks.{layer}.{hook_in}",
            "hook_name_out": f"blocks.{layer}.{hook_out}",
            "sae_lens_version": _SAELENS,
        },
    }
    return {f"layer_{layer}/sae_weights.safetensors": tensors}, config
