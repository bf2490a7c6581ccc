"""Hook points that transcoders read and write, under the names of TransformerLens and of transformers' own modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from pycircuit.transcoders.types import Reads, Writes

ReadHook = Literal[
    "hook_resid_mid",
    "hook_mlp_in",
    "ln2.hook_normalized",
    "mlp.hook_in",
    "pre_feedforward_layernorm.input",
    "pre_feedforward_layernorm.output",
    "mlp.input",
]
WriteHook = Literal["hook_mlp_out", "mlp.hook_out", "post_feedforward_layernorm.output", "mlp.output"]
ReadSite: TypeAlias = Reads | ReadHook  # what `load` takes as `reads`
WriteSite: TypeAlias = Writes | WriteHook
Stream = TypeVar("Stream", Reads, Writes)

READS: dict[ReadHook, Reads] = {
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "resid_mid",
    "ln2.hook_normalized": "mlp_normed",
    "mlp.hook_in": "mlp_in",
    "pre_feedforward_layernorm.input": "resid_mid",
    "pre_feedforward_layernorm.output": "mlp_in",
    "mlp.input": "mlp_in",
}
WRITES: dict[WriteHook, Writes] = {
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_raw",
    "post_feedforward_layernorm.output": "mlp_out",
    "mlp.output": "mlp_raw",
}
# Names that saving uses.
READ_NAMES: dict[Reads, str] = {
    "resid_mid": "hook_resid_mid",
    "mlp_normed": "ln2.hook_normalized",
    "mlp_in": "mlp.hook_in",
}
WRITE_NAMES: dict[Writes, str] = {"mlp_out": "hook_mlp_out", "mlp_raw": "mlp.hook_out"}
_LAYER = re.compile(r"^(?:(?:model|language_model|transformer|gpt_neox)\.)*(?:blocks|layers|h)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The layer that a hook's full name starts with."""
    match = _LAYER.match(name)
    return None if match is None else int(match[1])


def require_layer(config_path: Path, key: str, value: Any, layer: int) -> None:
    """Raise an error if a hook's full name is of another layer; short names are of any."""
    named = layer_of(value) if isinstance(value, str) else None
    if named not in (None, layer):
        raise ValueError(f"load: {config_path}: {key} must be of layer {layer}, got {value!r}; are files mixed up?")


def without_layer(name: Any) -> Any:
    """A hook's name without its layer."""
    return _LAYER.sub("", name) if isinstance(name, str) else name


def _known(config_path: Path, key: str, value: Any, names: Mapping[Any, Stream], argument: str) -> Stream:
    known = without_layer(value)
    if not isinstance(known, str) or known not in names:
        raise ValueError(
            f"load: {config_path}: {key} must be one of {', '.join(names)}, got {value!r}; "
            f"say {argument}= where you know better"
        )
    return names[known]


def reads(config_path: Path, key: str, value: Any) -> Reads:
    """The stream that a configuration's hook reads."""
    return _known(config_path, key, value, READS, "reads")


def writes(config_path: Path, key: str, value: Any) -> Writes:
    """The stream that a configuration's hook writes."""
    return _known(config_path, key, value, WRITES, "writes")


def model_name(configs: Iterable[dict[str, Any]]) -> str | None:
    """The first name of a model among configurations."""
    names = (config.get("model_name") for config in configs)
    return next((name for name in names if isinstance(name, str)), None)
