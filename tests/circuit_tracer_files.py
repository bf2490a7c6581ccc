"""Files in the layout of circuit-tracer's graphs, and stand-ins for its classes."""

from __future__ import annotations

import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

LAYERS, POSITIONS, VOCABULARY = 2, 2, 50


class LogitTarget(NamedTuple):
    token_str: str
    vocab_idx: int


@dataclass
class UnifiedConfig:
    n_layers: int = LAYERS
    d_model: int = 8
    d_head: int = 4
    n_heads: int = 2
    d_mlp: int = 16
    d_vocab: int = VOCABULARY
    tokenizer_name: str = "org/tokenizer"
    model_name: str = "org/model"
    original_architecture: str = "Gemma"
    n_key_value_heads: int | None = None
    dtype: Any = torch.bfloat16


@dataclass
class HookedTransformerConfig(UnifiedConfig):
    """As TransformerLens had it, with a number of NumPy's."""

    attn_scale: Any = None
    device: Any = None


MODULES = {
    "circuit_tracer.attribution.targets": LogitTarget,
    "circuit_tracer.utils.tl_nnsight_mapping": UnifiedConfig,
    "transformer_lens.HookedTransformerConfig": HookedTransformerConfig,
}


def content() -> dict[str, Any]:
    """Three active features, two of them selected; two targets, of which one is no token."""
    nodes = 2 + LAYERS * POSITIONS + POSITIONS + 2
    matrix = torch.zeros(nodes, nodes)
    matrix[0, 6] = 0.5  # feature 0 (layer 0) from the first token
    matrix[1, [0, 2, 7]] = torch.tensor([2.0, -1.0, 0.25])  # feature 2 (layer 1) from it, an error, the other token
    matrix[8, [0, 1]] = torch.tensor([1.5, 3.0])
    matrix[9, [1, 5]] = torch.tensor([-2.0, 1.0])
    return {
        "input_string": "<bos>a",
        "adjacency_matrix": matrix,
        "cfg": UnifiedConfig(),
        "active_features": torch.tensor([[0, 0, 1], [1, 1, 1], [3, 4, 5]]).T,
        "logit_targets": [LogitTarget(" b", 7), LogitTarget("b - c", VOCABULARY + 1)],
        "logit_probabilities": torch.tensor([0.75, 0.25]),
        "vocab_size": VOCABULARY,
        "input_tokens": torch.tensor([2, 9]),
        "selected_features": torch.tensor([0, 2]),
        "activation_values": torch.tensor([1.0, 2.0, 4.0]),
        "scan": "org/transcoders",
    }


def saved(path: Path, **changes: Any) -> Path:
    """None: taken away."""
    torch.save({k: v for k, v in {**content(), **changes}.items() if v is not None}, path)
    return path


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return {2: "<bos>", 9: "a"}.get(ids[0], f"<{ids[0]}>")


def with_opcodes(path: Path, name: str, opcodes: bytes) -> Path:
    """Write a file with these opcodes in the place of a value."""
    there = b"X\x04\0\0\0MARK"
    saved(path, **{name: "MARK"})

    def change(member: str, data: bytes) -> bytes:
        assert not member.endswith("data.pkl") or there in data
        return data.replace(there, opcodes) if member.endswith("data.pkl") else data

    repacked(path, change)
    return path


def repacked(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as old:
        members = [(m.filename, old.read(m)) for m in old.infolist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in members:
            new.writestr(name, change(name, data))


@contextmanager
def installed_classes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Put the stand-ins where pickle looks for circuit-tracer's classes; calling the result removes them."""
    with monkeypatch.context() as patch:
        for module, stand_in in MODULES.items():
            parents = module.split(".")
            for n in range(1, len(parents) + 1):
                patch.setitem(sys.modules, ".".join(parents[:n]), types.ModuleType(".".join(parents[:n])))
            setattr(sys.modules[module], stand_in.__name__, stand_in)
            patch.setattr(stand_in, "__module__", module)
        yield patch.undo
