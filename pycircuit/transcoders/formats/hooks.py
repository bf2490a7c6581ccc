"""Where transcoders read and write, under the names of TransformerLens and of transformers' own modules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

READS = {
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "resid_mid",
    "ln2.hook_normalized": "mlp_normed",
    "mlp.hook_in": "mlp_in",
    "pre_feedforward_layernorm.input": "resid_mid",
    "pre_feedforward_layernorm.output": "mlp_in",
    "mlp.input": "mlp_in",
}
WRITES = {
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_raw",
    "post_feedforward_layernorm.output": "mlp_out",
    "mlp.output": "mlp_raw",
}
# The names that saving gives them.
READ_NAMES = {"resid_mid": "hook_resid_mid", "mlp_normed": "ln2.hook_normalized", "mlp_in": "mlp.hook_in"}
WRITE_NAMES = {"mlp_out": "hook_mlp_out", "mlp_raw": "mlp.hook_out"}
_LAYER = re.compile(r"^(?:(?:model|language_model|transformer|gpt_neox)\.)*(?:blocks|layers|h)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The layer a hook's full name starts with."""
    found = _LAYER.match(name)
    return None if found is None else int(found[1])


def same_layer(said_by: Path, key: str, value: Any, at: int) -> None:
    """A hook's full name must be of the layer it is said for; short ones are of any."""
    found = layer_of(value) if isinstance(value, str) else None
    if found not in (None, at):
        raise ValueError(f"load: {said_by}: {key} must be of layer {at}, got {value!r}; are files mixed up?")


def short(name: Any) -> Any:
    """A hook's name without its layer."""
    return _LAYER.sub("", name) if isinstance(name, str) else name


def _known(said_by: Path, key: str, value: Any, names: dict[str, str], argument: str) -> str:
    known = short(value)
    if not isinstance(known, str) or known not in names:
        raise ValueError(
            f"load: {said_by}: {key} must be one of {', '.join(names)}, got {value!r}; "
            f"say {argument}= where you know better"
        )
    return names[known]


def reads(said_by: Path, key: str, value: Any) -> str:
    return _known(said_by, key, value, READS, "reads")


def writes(said_by: Path, key: str, value: Any) -> str:
    return _known(said_by, key, value, WRITES, "writes")
