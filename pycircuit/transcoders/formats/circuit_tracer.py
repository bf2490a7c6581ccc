"""circuit-tracer, per layer: `layer_{i}.safetensors` and `config.yaml`.

W_enc [F, d], W_dec [F, d], b_enc [F], b_dec [d]; activation_function.threshold [F] makes it a JumpReLU; W_skip [d, d]
is used as x @ W_skip.T. `activation: topk` with `k` keeps the k largest whatever their sign, as circuit-tracer does.
Sets that we save say more under `pycircuit:`, which circuit-tracer does not read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pycircuit.ops import Activation, BatchTopK, ReLU, TopK
from pycircuit.transcoders.types import Reads, Writes

from . import hooks
from .config_files import parse_activation, read_yaml, whole_number
from .contents import Contents, Layer, require_same_tensors, require_tensors
from .select import Overrides, check_layer_count, missing_layer
from .stored_tensors import StoredTensor, open_tensors

KIND = "transcoder_set"
NEEDED = ("W_enc", "W_dec", "b_enc", "b_dec")
OPTIONAL = ("activation_function.threshold", "W_skip")
_FILE = re.compile(r"layer_(\d+)\.safetensors(\.index\.json)?")


def detect(folder: Path) -> str | None:
    files = layer_files(folder, _FILE)
    if model_kind(folder) == KIND and files:
        return f"config.yaml of a {KIND} and {len(files)} files layer_*.safetensors"
    return None


def model_kind(folder: Path) -> str | None:
    """The model_kind of config.yaml, if there is one."""
    path = folder / "config.yaml"
    kind = read_yaml(path).get("model_kind") if path.is_file() else None
    return kind if isinstance(kind, str) else None


def layer_files(folder: Path, pattern: re.Pattern[str]) -> dict[int, str]:
    """The file of each layer; an index of shards counts as its file."""
    files: dict[int, str] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        layer = int(match[1])
        if str(layer) != match[1]:
            raise ValueError(f"load: {path} must give its layer as a plain number, got {match[1]!r}")
        files[layer] = path.name.removesuffix(".index.json")
    return files


def read(folder: Path, overrides: Overrides) -> Contents:
    config_path = folder / "config.yaml"
    config = read_yaml(config_path)
    own = own_entries(config_path, config)
    files = layer_files(folder, _FILE)
    count = layer_count(own, files, overrides)
    check_layer_count(folder, files, count)
    layers = []
    for layer in range(count):
        empty = saved_empty(own, layer)
        if layer in files:
            layers.append(read_layer(folder / files[layer], config_path, config, layer, empty))
        elif overrides.layers is not None or empty:
            layers.append(Layer())
        else:
            raise missing_layer(folder, layer, f"layer_{layer}.safetensors")
    check_against_config(config_path, config, layers)
    reads, writes = hook_points(config_path, config, overrides)
    return Contents(folder, layers, False, reads, writes, hooks.model_name([config]), config)


def layer_count(own: dict[str, Any], files: dict[int, str], overrides: Overrides) -> int:
    """The number of layers: as said, as saved, or up to the last file."""
    if overrides.layers is not None:
        return overrides.layers
    return int(own.get("layers", 0)) or max(files) + 1


def saved_empty(own: dict[str, Any], layer: int) -> bool:
    """True if the set was saved without a transcoder for this layer."""
    sizes = own.get("features")
    return sizes is not None and layer < len(sizes) and sizes[layer] is None


def own_entries(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Entries that saving added under our own name, checked: {} in a configuration of others."""
    own = config.get("pycircuit", {})
    if not isinstance(own, dict):
        raise ValueError(f"load: {path}: pycircuit must hold names and values, got {type(own).__name__}")
    if not own:
        return {}
    count = whole_number(path, "pycircuit.layers", own.get("layers"), 1)
    sizes = own.get("features")
    if not isinstance(sizes, list) or len(sizes) != count or not all(s is None or type(s) is int for s in sizes):
        raise ValueError(f"load: {path}: pycircuit.features must be a list of {count} sizes, got {sizes!r}")
    return own


def check_against_config(config_path: Path, config: dict[str, Any], layers: list[Layer]) -> None:
    """Compare layers with our own entries; others' sets have thresholds, and a skip, everywhere or nowhere."""
    own = config.get("pycircuit") or {}
    if not own:
        require_same_tensors(layers, "theta", "w_skip")
        return
    for i, (layer, size) in enumerate(zip(layers, own["features"], strict=False)):
        if layer.size not in (None, size):
            raise ValueError(f"load: {config_path} must say how many features layer {i} has, {layer.size}, got {size}")


def activation_rule(config_path: Path, config: dict[str, Any], layer: int) -> tuple[Activation, bool | None]:
    """The activation of a layer, and True if it has thresholds: None where its tensors say that."""
    own = config.get("pycircuit") or {}
    entry = own.get("activation")
    if entry is not None:
        entry = entry[layer] if isinstance(entry, list) and len(entry) == own["layers"] else entry
        rule = parse_activation(config_path, entry)
        return rule, None if isinstance(rule, BatchTopK) else entry.get("activation") == "jumprelu"
    name = config.get("activation")
    plain = re.sub("[_-]", "", name).lower() if isinstance(name, str) else name
    if plain in (None, "relu", "jumprelu"):
        return ReLU(), True if plain == "jumprelu" else None
    if plain == "topk":
        return TopK(whole_number(config_path, "k", config.get("k"), 1), keep_negative=True), False
    raise ValueError(f"load: {config_path}: activation must be relu, jump_relu or topk, got {name!r}")


def hook_points(config_path: Path, config: dict[str, Any], overrides: Overrides) -> tuple[Reads, Writes]:
    """Streams that the set reads and writes."""
    own = config.get("pycircuit") or {}
    hook_in, hook_out = config.get("feature_input_hook"), config.get("feature_output_hook")
    if own:
        hook_in, hook_out = own.get("reads", hook_in), own.get("writes", hook_out)
        hook_in = next((hook for reads, hook in hooks.READ_NAMES.items() if reads == hook_in), hook_in)
        hook_out = next((hook for writes, hook in hooks.WRITE_NAMES.items() if writes == hook_out), hook_out)
    return (
        overrides.reads or hooks.reads(config_path, "feature_input_hook", hook_in),
        overrides.writes or hooks.writes(config_path, "feature_output_hook", hook_out),
    )


def read_layer(path: Path, config_path: Path, config: dict[str, Any], layer: int, empty: bool = False) -> Layer:
    tensors = open_tensors(path)
    require_tensors(path, tensors, () if empty else NEEDED, (*NEEDED, *OPTIONAL) if empty else OPTIONAL)
    w_enc, w_dec, b_enc, b_dec, theta, w_skip = (tensors.get(name) for name in (*NEEDED, *OPTIONAL))
    rule, jumps = activation_rule(config_path, config, layer)
    theta = None if empty else thresholds(path, config_path, rule, jumps, theta)
    return Layer(w_enc, b_enc, w_dec, b_dec, theta, w_skip, rule=rule, skip_transposed=True)


def thresholds(
    path: Path, config_path: Path, rule: Activation, jumps: bool | None, theta: StoredTensor | None
) -> StoredTensor | None:
    """Thresholds that the rule uses.

    A BatchTopK is saved with its threshold for each feature, which makes others see the JumpReLU that it is.
    """
    if jumps is not None and jumps != (theta is not None):
        expected = "a jumprelu" if jumps else "another activation"
        got = "none" if theta is None else theta.name
        raise ValueError(
            f"load: {path} must hold thresholds exactly if {config_path} says so, got {expected} and {got}"
        )
    return None if isinstance(rule, BatchTopK) else theta
