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

from . import hooks
from .files import Stored, open_tensors, read_json
from .parts import Asked, Contents, Fold, Layer, flag, same_everywhere, scalar, take, whole
from .variants import beside, chosen, in_order, tree

_FILE = "sae_weights.safetensors"
_THETA = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."
_OURS, _OTHERS = ("sae", "clt", "transcoder"), ("crosscoder", "lorsa", "molt")
_FOLDER = re.compile(r"(?:.*/)?layer_?(\d+)(?:_[^/]*)?/" + re.escape(_FILE))


def _named(folder: Path) -> dict[str, dict[str, Any]]:
    """Weights whose config.json has a sae_type of ours."""
    found = {}
    for name in tree(folder, _FILE):
        path = (folder / name).with_name("config.json")
        config = read_json(path) if path.is_file() else {}
        if config.get("sae_type") in _OURS:
            found[name] = config
    return found


def _check_kinds(folder: Path, asked: Asked) -> None:
    """Every file of weights says what it is, one of ours or of the others that lie beside."""
    names = tree(folder, _FILE)
    beside(folder, names, asked, "config.json")
    for name in chosen(names, asked.variant):
        path = (folder / name).with_name("config.json")
        kind = read_json(path).get("sae_type")
        if kind not in (*_OURS, *_OTHERS):
            raise ValueError(f"load: {path}: sae_type must be one of {', '.join((*_OURS, *_OTHERS))}, got {kind!r}")


def sees(folder: Path) -> str | None:
    found = _named(folder)
    return f"{len(found)} files {_FILE}, each with the sae_type in config.json" if found else None


def read(folder: Path, asked: Asked) -> Contents:
    _check_kinds(folder, asked)
    found = _named(folder)
    found = {name: found[name] for name in chosen(found, asked.variant)}
    crosses = [name for name, config in found.items() if config["sae_type"] == "clt"]
    if not found or len(crosses) > 1 or (crosses and len(found) > 1):
        raise ValueError(f"load: variant must leave one set of {folder}, got {sorted(found)[:6]}")
    if crosses:
        return _cross(folder / crosses[0], found[crosses[0]], asked)
    return _single(folder, found, asked)


def _single(folder: Path, found: dict[str, dict[str, Any]], asked: Asked) -> Contents:
    paths: dict[int, Path] = {}
    read, write = {}, {}
    for name, config in found.items():
        said_by = (folder / name).with_name("config.json")
        at = hooks.layer_of(str(config.get("hook_point_in")))
        if at is None:
            got = config.get("hook_point_in")
            raise ValueError(f"load: {said_by}: hook_point_in must name a layer such as blocks.3., got {got!r}")
        if at in paths:
            raise ValueError(f"load: variant must leave one file for layer {at}, got {paths[at]} and {folder / name}")
        paths[at], named = folder / name, _FOLDER.fullmatch(name)
        hooks.same_layer(said_by, "hook_point_out", config.get("hook_point_out"), at)
        if named is not None and int(named[1]) != at:
            got = config.get("hook_point_in")
            raise ValueError(
                f"load: {said_by}: hook_point_in must be of layer {named[1]} as its folder is, got {got!r}"
            )
        if not asked.reads:
            read[said_by] = hooks.reads(said_by, "hook_point_in", config.get("hook_point_in"))
        if not asked.writes:
            write[said_by] = hooks.writes(said_by, "hook_point_out", config.get("hook_point_out"))
    layers = in_order(folder, paths, lambda at: layer(paths[at]), asked)
    places = (asked.reads or same_everywhere("reads", read), asked.writes or same_everywhere("writes", write))
    return Contents(folder, layers, False, str(places[0]), str(places[1]), config=next(iter(found.values())))


def _rule(said_by: Path, config: dict[str, Any]) -> Activation:
    kind = str(config.get("act_fn", "relu")).lower()
    if kind == "topk":
        return TopK(whole(said_by, "top_k", config.get("top_k", config.get("k")), 1))
    if kind not in ("relu", "jumprelu"):
        raise ValueError(
            f"load: {said_by}: act_fn must be relu, jumprelu or topk, got {kind!r}, which depends on the batch; "
            "save it as a jumprelu first"
        )
    return ReLU()


def _plain(said_by: Path, config: dict[str, Any]) -> None:
    if flag(said_by, config, "use_glu_encoder", False):
        raise ValueError(f"load: {said_by}: use_glu_encoder must be false, got true, which pycircuit does not compute")
    kind = config.get("norm_activation", "inference")
    if kind not in ("inference", "dataset-wise"):
        raise ValueError(f"load: {said_by}: norm_activation must be inference or dataset-wise, got {kind!r}")


def _unit(tensors: dict[str, Stored], config: dict[str, Any], hook: str, width: int, path: Path) -> float:
    """What a stream is multiplied by before it is read: 1, or the square root of its width over its mean norm."""
    if config.get("norm_activation", "inference") == "inference":
        return 1.0
    if _NORM + hook not in tensors:
        raise ValueError(f"load: {path} must hold {_NORM}{hook} for norm_activation dataset-wise, got none")
    norm = scalar(tensors[_NORM + hook])
    if norm <= 0:
        raise ValueError(f"load: {path}: {_NORM}{hook} must be positive, got {norm}")
    return sqrt(width) / norm


def _taken(path: Path, tensors: dict[str, Stored], needed: list[str]) -> None:
    norms = [name for name in tensors if name.startswith(_NORM)]
    take(path, tensors, needed, norms)


def layer(path: Path) -> Layer:
    said_by = path.with_name("config.json")
    config, tensors = read_json(said_by), open_tensors(path)
    _plain(said_by, config)
    rule, jumps = _rule(said_by, config), str(config.get("act_fn", "relu")).lower() == "jumprelu"
    needed = ["W_E", "W_D", "b_E", *(["b_D"] * flag(said_by, config, "use_decoder_bias", True)), *([_THETA] * jumps)]
    _taken(path, tensors, needed)
    width = tensors["W_E"].shape[0] if tensors["W_E"].shape else 0
    inner, outer = (
        _unit(tensors, config, str(config.get(k)), width, path) for k in ("hook_point_in", "hook_point_out")
    )
    fold = Fold(gain_in=inner, gain_out=1 / outer, bias_gain=1 / outer, by_norm=_by_norm(said_by, config))
    return Layer(
        tensors["W_E"], tensors["b_E"], tensors["W_D"], tensors.get("b_D"), tensors.get(_THETA), rule=rule,
        transposed=True, log_theta=True, fold=fold,
    )  # fmt: skip


def _by_norm(said_by: Path, config: dict[str, Any]) -> bool:
    return flag(said_by, config, "sparsity_include_decoder_norm", True)


def _cross(path: Path, config: dict[str, Any], asked: Asked) -> Contents:
    said_by, tensors = path.with_name("config.json"), open_tensors(path)
    _plain(said_by, config)
    rule, jumps = _rule(said_by, config), str(config.get("act_fn", "relu")).lower() == "jumprelu"
    ins, outs = (config.get(f"hook_points_{side}") for side in ("in", "out"))
    if not isinstance(ins, list) or not isinstance(outs, list) or len(ins) != len(outs) or not ins:
        raise ValueError(f"load: {said_by} must list hook_points_in and as many hook_points_out, got {ins!r}, {outs!r}")
    depth = len(ins)
    for at, pair in enumerate(zip(ins, outs, strict=True)):
        for side, hook in zip(("in", "out"), pair, strict=True):
            hooks.same_layer(said_by, f"hook_points_{side}", hook, at)
    decoders = [f"W_D.{at}" for at in range(depth)] + [f"b_D.{at}" for at in range(depth)]
    _taken(path, tensors, ["W_E", "b_E", *decoders, *([_THETA] * jumps)])
    shape = tensors["W_E"].shape
    if len(shape) != 3 or shape[0] != depth:
        raise ValueError(f"load: {tensors['W_E']} must have shape [{depth}, width, features], got {list(shape)}")
    units = [[_unit(tensors, config, str(h), shape[1], path) for h in side] for side in (ins, outs)]
    layers = []
    for at in range(depth):
        fold = Fold(
            gain_in=units[0][at], gain_out=[1 / u for u in units[1][at:]], bias_gain=1 / units[1][at],
            by_norm=_by_norm(said_by, config),
        )  # fmt: skip
        layers.append(by_target(tensors, at, depth, ("W_E", "b_E", "W_D.{}", _THETA), rule, fold))
    layers = [replace(one, b_dec=tensors[f"b_D.{at}"]) for at, one in enumerate(layers)]
    read = asked.reads or same_everywhere("reads", {h: hooks.reads(said_by, "hook_points_in", h) for h in ins})
    write = asked.writes or same_everywhere("writes", {h: hooks.writes(said_by, "hook_points_out", h) for h in outs})
    return Contents(path.parent, layers, True, str(read), str(write), config=config)


def by_target(
    tensors: dict[str, Stored], at: int, depth: int, names: tuple[str, str, str, str], rule: Activation, fold: Fold
) -> Layer:
    """One layer of encoders stacked by layer and decoders [l+1, F, d] by the layer written to.

    names: of the encoders, of their biases, of the decoder of a target layer, of thresholds [L, F] or absent ones.
    """
    for target in range(at, depth):
        plane = tensors[names[2].format(target)]
        if len(plane.shape) != 3 or plane.shape[0] != target + 1:
            raise ValueError(
                f"load: {plane} must have shape [{target + 1}, features, width], one entry for each layer up to its "
                f"own, got {list(plane.shape)}"
            )
    for name in (names[0], names[1], names[3]):
        if name in tensors and (not tensors[name].shape or tensors[name].shape[0] != depth):
            raise ValueError(f"load: {tensors[name]} must have {depth} layers, got shape {list(tensors[name].shape)}")
    theta = tensors.get(names[3])
    return Layer(
        tensors[names[0]].entry(at), tensors[names[1]].entry(at),
        [tensors[names[2].format(target)].entry(at) for target in range(at, depth)],
        theta=None if theta is None else theta.entry(at), rule=rule, transposed=True, log_theta=True, fold=fold,
    )  # fmt: skip
