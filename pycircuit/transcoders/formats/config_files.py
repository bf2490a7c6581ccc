"""Configurations beside tensors: JSON and plain YAML, checked as they are read."""

from __future__ import annotations

import json
from pathlib import Path
from sys import float_info
from typing import Any, TypeVar

from pycircuit.files.reading import reading
from pycircuit.files.safetensors import unique_names
from pycircuit.ops import Activation, BatchTopK, JumpReLU, ReLU, TopK

Text = TypeVar("Text", bound=str)

_TEXT_BYTES = 16 << 20
_YAML_BYTES = 128 << 10  # a hundred layers' locations take ten times less, and reading them is slow


def path_inside(folder: Path, name: str, config_path: Path) -> Path:
    """Path of a file that a configuration names, which must lie in the folder."""
    components = Path(name).parts
    if not name or Path(name).is_absolute() or ".." in components or "\x00" in name:
        raise ValueError(f"load: {config_path} must name files inside its folder, got {name!r}")
    path = folder / name
    try:
        exists = path.is_file()
    except OSError:  # a name that no file can have
        exists = False
    if not exists:
        raise FileNotFoundError(f"load: {config_path} names {name[:200]}, which must be in {folder}, got no such file")
    return path


def _read_text(path: Path, most: int = _TEXT_BYTES) -> str:
    try:
        with reading(path):
            size = path.stat().st_size
            if size > most:
                raise ValueError(f"load: {path} must be a configuration of at most {most} bytes, got {size}")
            return path.read_text("utf-8-sig")  # Windows puts a mark before it
    except UnicodeDecodeError as error:
        raise ValueError(f"load: {path} must be text, got {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Object of a JSON file; an error if it has a name twice."""
    try:
        value = json.loads(_read_text(path), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("load:"):
            raise
        raise ValueError(f"load: {path} must be JSON, got {error}") from None
    return _mapping(path, value)


def read_yaml(path: Path) -> dict[str, Any]:
    """Mapping of a plain YAML file: no tags, no anchors, no name twice."""
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias, which can stand for more than fits into memory")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            if len({str(key) for key in keys}) != len(keys):
                raise yaml.YAMLError("a name twice")
            mapping = super().construct_mapping(node, deep)
            if len(mapping) != len(node.value):
                raise yaml.YAMLError("a name twice, in two ways of writing it")
            return mapping

    try:
        value = yaml.load(_read_text(path, _YAML_BYTES), Plain)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        if str(error).startswith("load:"):
            raise
        raise ValueError(f"load: {path} must be plain YAML, got {' '.join(str(error).split())}") from None
    return _mapping(path, value)


def _mapping(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"load: {path} must hold names and values, got {type(value).__name__}")
    return value


def whole_number(config_path: Path, name: str, value: Any, least: int) -> int:
    """The value, if it is an int of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"load: {config_path}: {name} must be a whole number of at least {least}, got {value!r}")
    return value


def flag(config_path: Path, config: dict[str, Any], name: str, default: bool) -> bool:
    """The entry of this name, if it is true or false."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"load: {config_path}: {name} must be true or false, got {value!r}")
    return value


def finite_number(config_path: Path, name: str, value: Any) -> float:
    """The value, if it is a finite number."""
    if type(value) not in (int, float) or not abs(value) <= float_info.max:
        raise ValueError(f"load: {config_path}: {name} must be a finite number, got {value!r}")
    return float(value)


def activation_config(rule: Activation) -> dict[str, Any]:
    """Entries that describe an activation; thresholds of their own are tensors."""
    if isinstance(rule, TopK):
        return {"activation": "topk", "k": rule.k, "keep_negative": rule.keep_negative}
    if isinstance(rule, BatchTopK):
        return {"activation": "batchtopk", "threshold": rule.threshold}
    return {"activation": "jumprelu" if isinstance(rule, JumpReLU) else "relu"}


def parse_activation(config_path: Path, config: Any) -> Activation:
    """The activation that `activation_config` described."""
    if not isinstance(config, dict):
        raise ValueError(f"load: {config_path}: activation must be names and values, got {config!r}")
    name = config.get("activation")
    if name in ("relu", "jumprelu"):
        return ReLU()
    if name == "topk":
        keep_negative = flag(config_path, config, "keep_negative", False)
        return TopK(whole_number(config_path, "k", config.get("k"), 1), keep_negative)
    if name == "batchtopk":
        return BatchTopK(finite_number(config_path, "threshold", config.get("threshold")))
    raise ValueError(f"load: {config_path}: activation must be relu, jumprelu, topk or batchtopk, got {name!r}")


def same_in_every_layer(name: str, values: dict[Any, Text]) -> Text | None:
    """The value that all layers have in common; None without any. values: by where they were read."""
    distinct = sorted(set(values.values()))
    if len(distinct) > 1:
        first = {value: source for source, value in reversed(values.items())}
        got = " and ".join(f"{value} ({first[value]})" for value in distinct)
        raise ValueError(f"load: {name} must be the same in every layer, got {got}")
    return distinct[0] if distinct else None
