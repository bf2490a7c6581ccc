"""circuit-tracer, per layer: `layer_{i}.safetensors` and `config.yaml`.

W_enc [F, d], W_dec [F, d], b_enc [F], b_dec [d]; activation_function.threshold [F] makes it a JumpReLU; W_skip [d, d]
is used as x @ W_skip.T. `activation: topk` with `k` keeps the k largest whatever their sign, as circuit-tracer does.
What we save says more under `pycircuit:`, which circuit-tracer does not read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pycircuit.ops import Activation, BatchTopK, ReLU, TopK

from . import hooks
from .files import Stored, open_tensors, read_yaml
from .parts import Asked, Contents, Layer, alike, missing, rule_of, take, whole

KIND = "transcoder_set"
NEEDED = ("W_enc", "W_dec", "b_enc", "b_dec")
OPTIONAL = ("activation_function.threshold", "W_skip")
_FILE = re.compile(r"layer_(\d+)\.safetensors(\.index\.json)?")


def sees(folder: Path) -> str | None:
    """What there is to see of it, or None."""
    config = kind_of(folder)
    layers = files(folder, _FILE)
    if config == KIND and layers:
        return f"config.yaml of a {KIND} and {len(layers)} files layer_*.safetensors"
    return None


def kind_of(folder: Path) -> str | None:
    """The model_kind of config.yaml, if there is one."""
    path = folder / "config.yaml"
    found = read_yaml(path).get("model_kind") if path.is_file() else None
    return found if isinstance(found, str) else None


def files(folder: Path, pattern: re.Pattern[str]) -> dict[int, str]:
    """The files of each layer, without what says they are in parts."""
    found: dict[int, str] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        at = int(match[1])
        if str(at) != match[1]:
            raise ValueError(f"load: {path} must give its layer as a plain number, got {match[1]!r}")
        found[at] = path.name.removesuffix(".index.json")
    return found


def read(folder: Path, asked: Asked) -> Contents:
    config = read_yaml(folder / "config.yaml")
    ours, said_by = own(folder, config), folder / "config.yaml"
    found = files(folder, _FILE)
    depth, sizes = asked.layers, ours.get("features")
    count = depth if depth is not None else int(ours.get("layers", 0)) or max(found) + 1
    within(folder, found, count)
    layers = []
    for at in range(count):
        empty = holds_none(sizes, at)
        if at in found:
            layers.append(layer(folder / found[at], said_by, config, at, empty))
        elif depth is not None or empty:
            layers.append(Layer())
        else:
            raise missing(folder, at, f"layer_{at}.safetensors")
    check_alike(said_by, config, layers)
    return Contents(folder, layers, False, *where(said_by, config, asked), model_name(config), config)


def holds_none(sizes: Any, at: int) -> bool:
    """Whether it was saved without a transcoder for this layer."""
    return sizes is not None and at < len(sizes) and sizes[at] is None


def within(folder: Path, found: dict[int, str], count: int) -> None:
    if max(found) >= count:
        raise ValueError(f"load: layers must be at least {max(found) + 1}, {folder} holds so many, got {count}")


def own(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What saving added under our own name, checked: {} where it is not ours."""
    path, ours = folder / "config.yaml", config.get("pycircuit", {})
    if not isinstance(ours, dict):
        raise ValueError(f"load: {path}: pycircuit must hold names and values, got {type(ours).__name__}")
    if not ours:
        return {}
    count = whole(path, "pycircuit.layers", ours.get("layers"), 1)
    sizes = ours.get("features")
    if not isinstance(sizes, list) or len(sizes) != count or not all(s is None or type(s) is int for s in sizes):
        raise ValueError(f"load: {path}: pycircuit.features must be a list of {count} sizes, got {sizes!r}")
    return ours


def check_alike(said_by: Path, config: dict[str, Any], layers: list[Layer]) -> None:
    """Ours say what each layer has; others' have thresholds, and a skip, everywhere or nowhere."""
    ours = config.get("pycircuit") or {}
    if not ours:
        alike(layers, "theta", "w_skip")
        return
    for at, (one, said) in enumerate(zip(layers, ours["features"], strict=False)):
        if one.size not in (None, said):
            raise ValueError(f"load: {said_by} must say how many features layer {at} has, {one.size}, got {said}")


def rule(said_by: Path, config: dict[str, Any], at: int) -> tuple[Activation, bool | None]:
    """What the configuration says of a layer, and whether it has thresholds: None where its tensors say that."""
    ours = config.get("pycircuit") or {}
    said = ours.get("activation")
    if said is not None:
        said = said[at] if isinstance(said, list) and len(said) == ours["layers"] else said
        held = rule_of(said_by, said)
        return held, None if isinstance(held, BatchTopK) else said.get("activation") == "jumprelu"
    name = config.get("activation")
    plain = re.sub("[_-]", "", name).lower() if isinstance(name, str) else name
    if plain in (None, "relu", "jumprelu"):
        return ReLU(), True if plain == "jumprelu" else None
    if plain == "topk":
        return TopK(whole(said_by, "k", config.get("k"), 1), keep_negative=True), False
    raise ValueError(f"load: {said_by}: activation must be relu, jump_relu or topk, got {name!r}")


def where(said_by: Path, config: dict[str, Any], asked: Asked) -> tuple[str, str]:
    """Where they read and write."""
    ours = config.get("pycircuit") or {}
    read, write = (config.get(f"feature_{side}_hook") for side in ("input", "output"))
    if ours:
        read, write = ours.get("reads", read), ours.get("writes", write)
        read, write = hooks.READ_NAMES.get(str(read), read), hooks.WRITE_NAMES.get(str(write), write)
    return (
        asked.reads or hooks.reads(said_by, "feature_input_hook", read),
        asked.writes or hooks.writes(said_by, "feature_output_hook", write),
    )


def model_name(config: dict[str, Any]) -> str | None:
    name = config.get("model_name")
    return name if isinstance(name, str) else None


def layer(path: Path, said_by: Path, config: dict[str, Any], at: int, empty: bool = False) -> Layer:
    tensors = open_tensors(path)
    take(path, tensors, () if empty else NEEDED, (*NEEDED, *OPTIONAL) if empty else OPTIONAL)
    w_enc, w_dec, b_enc, b_dec, theta, w_skip = (tensors.get(name) for name in (*NEEDED, *OPTIONAL))
    activation, jumps = rule(said_by, config, at)
    theta = None if empty else thresholds(path, said_by, activation, jumps, theta)
    return Layer(w_enc, b_enc, w_dec, b_dec, theta, w_skip, rule=activation, skip_back=True)


def thresholds(
    path: Path, said_by: Path, activation: Activation, jumps: bool | None, theta: Stored | None
) -> Stored | None:
    """A BatchTopK is saved with its threshold for each feature, which makes others see the JumpReLU that it is."""
    if jumps is not None and jumps != (theta is not None):
        said = "a jumprelu" if jumps else "another activation"
        got = "none" if theta is None else theta.name
        raise ValueError(f"load: {path} must hold thresholds exactly if {said_by} says so, got {said} and {got}")
    return None if isinstance(activation, BatchTopK) else theta
