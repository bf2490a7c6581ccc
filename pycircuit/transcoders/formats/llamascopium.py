"""Llama-Scope-2 (llamascopium): `config.json` and `sae_weights.safetensors`, per layer or cross-layer.

Per layer: a folder `layer{i}_*` each, W_E [d, F], W_D [F, d], b_E, b_D. Cross-layer: one folder, W_E [L, d, F], b_E
[L, F], W_D.{l} [l+1, F, d] and b_D.{l} by the layer written to. A JumpReLU keeps the logarithm of its thresholds.

`sparsity_include_decoder_norm` compares values times the norm of the decoder row: thresholds are divided by it; for
a TopK the norm moves from the decoder into the encoder, so that values, not what is written, are in its units.
`norm_activation: dataset-wise` reads and writes streams divided by a norm that is in the file; it is folded in.
"""

from __future__ import annotations

import re
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from pycircuit.ops import Activation, ReLU, TopK
from pycircuit.transcoders.types import Reads, Writes

from . import hooks
from .config_files import flag, read_json, same_in_every_layer, whole_number
from .contents import Contents, Fold, Layer, require_tensors
from .reader import read_scalar
from .select import Overrides, find_files, matching, read_layers, require_configs
from .stored_tensors import StoredTensor, open_tensors

_FILE = "sae_weights.safetensors"
_THETA = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."
_KINDS, _OTHER_KINDS = ("sae", "clt", "transcoder"), ("crosscoder", "lorsa", "molt")
_FOLDER = re.compile(r"(?:.*/)?layer_?(\d+)(?:_[^/]*)?/" + re.escape(_FILE))


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Configurations of the weights whose config.json has a sae_type of ours."""
    configs = {}
    for name in find_files(folder, _FILE):
        path = (folder / name).with_name("config.json")
        config = read_json(path) if path.is_file() else {}
        if config.get("sae_type") in _KINDS:
            configs[name] = config
    return configs


def _check_kinds(folder: Path, overrides: Overrides) -> None:
    """Raise an error unless every file of weights has a known kind: ours, or one of those that lie beside."""
    names = find_files(folder, _FILE)
    require_configs(folder, names, overrides, "config.json")
    known = (*_KINDS, *_OTHER_KINDS)
    for name in matching(names, overrides.variant):
        path = (folder / name).with_name("config.json")
        kind = read_json(path).get("sae_type")
        if kind not in known:
            raise ValueError(f"load: {path}: sae_type must be one of {', '.join(known)}, got {kind!r}")


def detect(folder: Path) -> str | None:
    configs = _configs(folder)
    return f"{len(configs)} files {_FILE}, each with the sae_type in config.json" if configs else None


def read(folder: Path, overrides: Overrides) -> Contents:
    _check_kinds(folder, overrides)
    configs = _configs(folder)
    configs = {name: configs[name] for name in matching(configs, overrides.variant)}
    cross_layer = [name for name, config in configs.items() if config["sae_type"] == "clt"]
    if not configs or len(cross_layer) > 1 or (cross_layer and len(configs) > 1):
        raise ValueError(f"load: variant must leave one set of {folder}, got {sorted(configs)[:6]}")
    if cross_layer:
        return _read_cross_layer(folder / cross_layer[0], configs[cross_layer[0]], overrides)
    return _read_per_layer(folder, configs, overrides)


def _read_per_layer(folder: Path, configs: dict[str, dict[str, Any]], overrides: Overrides) -> Contents:
    paths: dict[int, Path] = {}
    ins: dict[Path, Reads] = {}
    outs: dict[Path, Writes] = {}
    for name, config in configs.items():
        path = folder / name
        config_path = path.with_name("config.json")
        layer = _named_layer(name, config_path, config)
        if layer in paths:
            raise ValueError(f"load: variant must leave one file for layer {layer}, got {paths[layer]} and {path}")
        paths[layer] = path
        if not overrides.reads:
            ins[config_path] = hooks.reads(config_path, "hook_point_in", config.get("hook_point_in"))
        if not overrides.writes:
            outs[config_path] = hooks.writes(config_path, "hook_point_out", config.get("hook_point_out"))
    layers = read_layers(folder, paths, lambda layer: read_layer(paths[layer]), overrides)
    reads = overrides.reads or same_in_every_layer("reads", ins)
    writes = overrides.writes or same_in_every_layer("writes", outs)
    assert reads is not None and writes is not None  # there is at least one configuration
    return Contents(folder, layers, False, reads, writes, config=next(iter(configs.values())))


def _named_layer(name: str, config_path: Path, config: dict[str, Any]) -> int:
    """The layer of a file, which its hooks and its folder agree on."""
    hook = config.get("hook_point_in")
    layer = hooks.layer_of(str(hook))
    if layer is None:
        raise ValueError(f"load: {config_path}: hook_point_in must name a layer such as blocks.3., got {hook!r}")
    hooks.require_layer(config_path, "hook_point_out", config.get("hook_point_out"), layer)
    match = _FOLDER.fullmatch(name)
    if match is not None and int(match[1]) != layer:
        raise ValueError(
            f"load: {config_path}: hook_point_in must be of layer {match[1]} as its folder is, got {hook!r}"
        )
    return layer


def _rule(config_path: Path, config: dict[str, Any]) -> tuple[Activation, bool]:
    """The activation, and True for a JumpReLU, whose thresholds are a tensor."""
    kind = str(config.get("act_fn", "relu")).lower()
    if kind == "topk":
        return TopK(whole_number(config_path, "top_k", config.get("top_k", config.get("k")), 1)), False
    if kind not in ("relu", "jumprelu"):
        raise ValueError(
            f"load: {config_path}: act_fn must be relu, jumprelu or topk, got {kind!r}, which depends on the batch; "
            "save it as a jumprelu first"
        )
    return ReLU(), kind == "jumprelu"


def _check_supported(config_path: Path, config: dict[str, Any]) -> None:
    if flag(config_path, config, "use_glu_encoder", False):
        raise ValueError(
            f"load: {config_path}: use_glu_encoder must be false, got true, which pycircuit does not compute"
        )
    kind = config.get("norm_activation", "inference")
    if kind not in ("inference", "dataset-wise"):
        raise ValueError(f"load: {config_path}: norm_activation must be inference or dataset-wise, got {kind!r}")


def _stream_gain(tensors: dict[str, StoredTensor], config: dict[str, Any], hook: str, width: int, path: Path) -> float:
    """Factor of a stream before it is read: 1, or the square root of its width over its mean norm."""
    if config.get("norm_activation", "inference") == "inference":
        return 1.0
    if _NORM + hook not in tensors:
        raise ValueError(f"load: {path} must hold {_NORM}{hook} for norm_activation dataset-wise, got none")
    norm = read_scalar(tensors[_NORM + hook])
    if norm <= 0:
        raise ValueError(f"load: {path}: {_NORM}{hook} must be positive, got {norm}")
    return sqrt(width) / norm


def _check_tensors(path: Path, tensors: dict[str, StoredTensor], needed: list[str]) -> None:
    norms = [name for name in tensors if name.startswith(_NORM)]
    require_tensors(path, tensors, needed, norms)


def _by_norm(config_path: Path, config: dict[str, Any]) -> bool:
    return flag(config_path, config, "sparsity_include_decoder_norm", True)


def read_layer(path: Path) -> Layer:
    config_path = path.with_name("config.json")
    config, tensors = read_json(config_path), open_tensors(path)
    _check_supported(config_path, config)
    rule, jumps = _rule(config_path, config)
    needed = ["W_E", "W_D", "b_E"]
    if flag(config_path, config, "use_decoder_bias", True):
        needed.append("b_D")
    if jumps:
        needed.append(_THETA)
    _check_tensors(path, tensors, needed)
    width = tensors["W_E"].shape[0] if tensors["W_E"].shape else 0
    gain_in = _stream_gain(tensors, config, str(config.get("hook_point_in")), width, path)
    gain_out = _stream_gain(tensors, config, str(config.get("hook_point_out")), width, path)
    by_norm = _by_norm(config_path, config)
    return Layer(
        tensors["W_E"],
        tensors["b_E"],
        tensors["W_D"],
        tensors.get("b_D"),
        tensors.get(_THETA),
        rule=rule,
        transposed=True,
        log_theta=True,
        fold=Fold(gain_in=gain_in, gain_out=1 / gain_out, bias_gain=1 / gain_out, by_norm=by_norm),
    )


def _cross_layer_hooks(config_path: Path, config: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Hooks that each layer reads, and those it writes."""
    ins, outs = (config.get(f"hook_points_{side}") for side in ("in", "out"))
    if not isinstance(ins, list) or not isinstance(outs, list) or len(ins) != len(outs) or not ins:
        raise ValueError(
            f"load: {config_path} must list hook_points_in and as many hook_points_out, got {ins!r}, {outs!r}"
        )
    for layer, pair in enumerate(zip(ins, outs, strict=True)):
        for side, hook in zip(("in", "out"), pair, strict=True):
            hooks.require_layer(config_path, f"hook_points_{side}", hook, layer)
    return ins, outs


def _read_cross_layer(path: Path, config: dict[str, Any], overrides: Overrides) -> Contents:
    config_path, tensors = path.with_name("config.json"), open_tensors(path)
    _check_supported(config_path, config)
    rule, jumps = _rule(config_path, config)
    ins, outs = _cross_layer_hooks(config_path, config)
    depth = len(ins)
    decoders = [f"W_D.{layer}" for layer in range(depth)] + [f"b_D.{layer}" for layer in range(depth)]
    _check_tensors(path, tensors, ["W_E", "b_E", *decoders, *([_THETA] * jumps)])
    shape = tensors["W_E"].shape
    if len(shape) != 3 or shape[0] != depth:
        raise ValueError(f"load: {tensors['W_E']} must have shape [{depth}, width, features], got {list(shape)}")
    gains_in = [_stream_gain(tensors, config, str(hook), shape[1], path) for hook in ins]
    gains_out = [_stream_gain(tensors, config, str(hook), shape[1], path) for hook in outs]
    by_norm = _by_norm(config_path, config)
    layers = []
    for layer in range(depth):
        inverse = [1 / gain for gain in gains_out[layer:]]
        fold = Fold(gain_in=gains_in[layer], gain_out=inverse, bias_gain=inverse[0], by_norm=by_norm)
        contents = layer_by_target(tensors, layer, depth, ("W_E", "b_E", "W_D.{}", _THETA), rule, fold)
        layers.append(replace(contents, b_dec=tensors[f"b_D.{layer}"]))
    reads, writes = overrides.reads, overrides.writes
    if not reads:
        reads = same_in_every_layer("reads", {h: hooks.reads(config_path, "hook_points_in", h) for h in ins})
    if not writes:
        writes = same_in_every_layer("writes", {h: hooks.writes(config_path, "hook_points_out", h) for h in outs})
    assert reads is not None and writes is not None  # there is at least one hook
    return Contents(path.parent, layers, True, reads, writes, config=config)


def layer_by_target(
    tensors: dict[str, StoredTensor],
    layer: int,
    depth: int,
    names: tuple[str, str, str, str],
    rule: Activation,
    fold: Fold,
) -> Layer:
    """One layer of encoders stacked by layer and decoders [l+1, F, d] by the layer written to.

    names: of the encoders, of their biases, of the decoder of a target layer, of thresholds [L, F] or absent ones.
    """
    encoder, bias, decoder, thresholds = names
    planes = [tensors[decoder.format(target)] for target in range(layer, depth)]
    for target, plane in enumerate(planes, layer):
        if len(plane.shape) != 3 or plane.shape[0] != target + 1:
            raise ValueError(
                f"load: {plane} must have shape [{target + 1}, features, width], one entry for each layer up to its "
                f"own, got {list(plane.shape)}"
            )
    for name in (encoder, bias, thresholds):
        if name in tensors and (not tensors[name].shape or tensors[name].shape[0] != depth):
            raise ValueError(f"load: {tensors[name]} must have {depth} layers, got shape {list(tensors[name].shape)}")
    theta = tensors.get(thresholds)
    return Layer(
        tensors[encoder].entry(layer),
        tensors[bias].entry(layer),
        [plane.entry(layer) for plane in planes],
        theta=None if theta is None else theta.entry(layer),
        rule=rule,
        transposed=True,
        log_theta=True,
        fold=fold,
    )
