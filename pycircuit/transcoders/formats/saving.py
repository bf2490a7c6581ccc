"""Transcoders to files, a layer at a time: from memory, or out of files of another format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycircuit.ops import Activation, BatchTopK, JumpReLU, TopK
from pycircuit.transcoders.types import CrossLayerTranscoder, Transcoders

from . import hooks
from .parts import Contents, Reader, describe
from .writing import write_folder

LAYOUTS = ("circuit-tracer", "pycircuit", "saelens")
_SAELENS = "6.0.0"  # whose configuration it is; without it they take it for an older one


class Weights(NamedTuple):
    """One layer as transcoders hold it; w_dec may be in a file."""

    w_enc: Tensor | None
    b_enc: Tensor | None
    w_dec: Any
    b_dec: Tensor | None
    rule: Activation
    w_skip: Tensor | None


@dataclass(frozen=True)
class Whole:
    """A set to be written. sizes: features of each layer, None without a transcoder; layer: its weights, when asked."""

    cross: bool
    reads: str
    writes: str
    sizes: list[int | None]
    rules: list[Activation]
    layer: Callable[[int], Weights]


def of_memory(t: Transcoders) -> Whole:
    def layer(at: int) -> Weights:
        return Weights(t.w_enc[at], t.b_enc[at], t.w_dec[at], t.b_dec[at], t.activation[at], t.w_skip[at])

    sizes = [None if w is None else w.shape[0] for w in t.w_enc]
    return Whole(isinstance(t, CrossLayerTranscoder), t.reads, t.writes, sizes, t.activation, layer)


def of_files(contents: Contents, dtype: torch.dtype | None) -> Whole:
    """Each layer is read when it is written."""

    def layer(at: int) -> Weights:
        r = Reader(contents.layers[at], None, dtype, True)
        return Weights(r.w_enc(), r.b_enc(), r.w_dec(), r.b_dec(), r.rule(), r.w_skip())

    sizes = [one.size for one in contents.layers]
    rules = [one.rule if one.theta is None else JumpReLU(0.0) for one in contents.layers]
    return Whole(contents.cross, contents.reads, contents.writes, sizes, rules, layer)


def write(
    op: str, whole: Whole, target: Path, to: str, model: str | None, scan: str | None, key: dict[str, Any] | None
) -> None:
    """The folder `target`, which is not there yet. key: what it is made of, to go on after a broken run."""
    if to == "saelens":
        _check_saelens(whole)
    texts: dict[str, str] = {} if to == "saelens" else {"config.yaml": _config(whole, target, model, scan)}
    write_folder(op, target, _files(whole, to, model, texts), texts, key)


def _files(whole: Whole, to: str, model: str | None, texts: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, tensors) of every file; what else a layer needs is added to texts."""
    for at in range(len(whole.sizes)):
        one = whole.layer(at)
        if to == "saelens":
            held, config = _saelens(one, at, whole, model)
            if config is not None:
                texts[f"layer_{at}/cfg.json"] = json.dumps(config, indent=1)
        else:
            held = (_cross if whole.cross else _single)(one, at)
        yield from held.items()


def _named(**tensors: Any) -> dict[str, Any]:
    return {name: t for name, t in tensors.items() if t is not None}


def _turned(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.T


def _single(one: Weights, at: int) -> dict[str, dict[str, Any]]:
    held = _named(W_enc=one.w_enc, W_dec=one.w_dec, b_enc=one.b_enc, b_dec=_bias(one), W_skip=_turned(one.w_skip))
    theta = thresholds(one)
    if theta is not None:
        held["activation_function.threshold"] = theta
    return {f"layer_{at}.safetensors": held} if held else {}


def _cross(one: Weights, at: int) -> dict[str, dict[str, Any]]:
    held = _named(W_enc=one.w_enc, b_enc=one.b_enc, b_dec=_bias(one), threshold=thresholds(one), W_skip=one.w_skip)
    found = {f"W_enc_{at}.safetensors": {f"{name}_{at}": t for name, t in held.items()}} if held else {}
    if one.w_dec is not None:
        found[f"W_dec_{at}.safetensors"] = {f"W_dec_{at}": one.w_dec}
    return found


def _bias(one: Weights) -> Tensor | None:
    """The others want a b_dec for every encoder."""
    if one.b_dec is None and one.w_enc is not None:
        return one.w_enc.new_zeros(one.w_enc.shape[1])
    return one.b_dec


def thresholds(one: Weights) -> Tensor | None:
    """[F], where the rule has any; a BatchTopK is a JumpReLU with one threshold for all."""
    if one.w_enc is None or not isinstance(one.rule, JumpReLU | BatchTopK):
        return None
    wide = torch.float64 if one.w_enc.dtype == torch.float64 else torch.float32
    theta = one.rule.theta if isinstance(one.rule, JumpReLU) else max(one.rule.threshold, 0.0)
    if not isinstance(theta, Tensor):
        theta = torch.tensor(float(theta), dtype=wide)
    return theta.expand(one.w_enc.shape[0]) if theta.numel() == 1 else theta


def _config(whole: Whole, target: Path, model: str | None, scan: str | None) -> str:
    """config.yaml, with what only we read under our own name."""
    import yaml

    rules = [describe(rule) for rule in whole.rules]
    own = {
        "layers": len(whole.sizes),
        "features": whole.sizes,
        "reads": whole.reads,
        "writes": whole.writes,
        "activation": rules[0] if all(r == rules[0] for r in rules) else rules,
    }
    config = {
        "model_name": model,
        "model_kind": "cross_layer_transcoder" if whole.cross else "transcoder_set",
        "feature_input_hook": hooks.READ_NAMES[whole.reads],
        "feature_output_hook": hooks.WRITE_NAMES[whole.writes],
        "scan": target.name if scan is None else scan,
        **_everywhere(whole),
        "pycircuit": own,
    }
    return yaml.safe_dump({name: value for name, value in config.items() if value is not None}, sort_keys=False)


def _everywhere(whole: Whole) -> dict[str, Any]:
    """A TopK as others say it, where all layers have the same one."""
    rules = [rule for size, rule in zip(whole.sizes, whole.rules, strict=True) if size is not None]
    first = rules[0] if rules else None
    return {"activation": "topk", "k": first.k} if isinstance(first, TopK) and all(r == first for r in rules) else {}


def _check_saelens(whole: Whole) -> None:
    if whole.cross:
        raise ValueError("convert: to must be circuit-tracer or pycircuit for a cross-layer transcoder, got saelens")
    if any(isinstance(rule, TopK) for rule in whole.rules):
        raise ValueError(
            "convert: to must be circuit-tracer or pycircuit for a TopK, which SAELens has none, got saelens"
        )


def _saelens(
    one: Weights, at: int, whole: Whole, model: str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """({file: tensors}, cfg.json)."""
    if one.w_enc is None:
        return {}, None
    theta = thresholds(one)
    if theta is not None and bool((theta < 0).any()):
        raise ValueError(f"convert: thresholds must not be negative for saelens, got some in layer {at}")
    held = _named(W_enc=_turned(one.w_enc), W_dec=one.w_dec, b_enc=one.b_enc, b_dec=_bias(one), threshold=theta,
                  W_skip=_turned(one.w_skip))  # fmt: skip
    size, width = one.w_enc.shape
    read, write = hooks.READ_NAMES[whole.reads], hooks.WRITE_NAMES[whole.writes]
    config = {
        "architecture": "jumprelu_" * (theta is not None) + "skip_" * (one.w_skip is not None) + "transcoder",
        "d_in": width, "d_sae": size, "d_out": width, "dtype": str(one.w_enc.dtype).removeprefix("torch."),
        "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": model, "hook_name": f"blocks.{at}.{read}", "hook_name_out": f"blocks.{at}.{write}",
            "sae_lens_version": _SAELENS,
        },
    }  # fmt: skip
    return {f"layer_{at}/sae_weights.safetensors": held}, config
