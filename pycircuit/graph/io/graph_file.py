"""Graphs in safetensors files: tensors, and one JSON text for all other fields. Never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pycircuit.files.atomic import replace_file, writable
from pycircuit.files.safetensors import tensor_entries, write_tensors
from pycircuit.graph.csr import Rows
from pycircuit.graph.endpoints import Targets, Tokens

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

VERSION = 1
_KEY = "pycircuit.graph"
_SAVE = "Graph.save"
_INT, _LONG, _DOUBLE = (torch.int32,), (torch.int64,), (torch.float64,)
_FLOATS = (torch.float32, torch.float64)
_NAMES = {"I32": torch.int32, "I64": torch.int64, "F32": torch.float32, "F64": torch.float64, "F16": torch.float16}
_TENSORS: dict[str, tuple[torch.dtype, ...]] = {
    "features": _LONG, "values": _FLOATS, "row_ptr": _LONG, "column": _INT, "weight": _FLOATS, "row_node": _LONG,
    "bias": _DOUBLE, "preactivation": _DOUBLE, "dropped": _DOUBLE, "dropped_mass": _DOUBLE,
    "target_ids": _LONG, "target_weights": _DOUBLE, "target_positions": _LONG, "token_ids": _LONG,
    "product_norm": _DOUBLE,
}  # fmt: skip
_OPTIONAL = {"product_norm"}  # older files have none
_TEXTS: dict[str, type] = {
    "layers": int, "prompt": str, "vocab_size": int, "target_labels": list, "token_text": list, "timings": dict,
    "provenance": dict,
}  # fmt: skip
_LABELS = ("labels", "automatic_labels")  # older files have names alone


class GraphFileError(ValueError):
    """A file that is not a complete graph of a version this package reads."""


def save(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Write a graph to a safetensors file, atomically."""
    fields = {
        **{name: getattr(graph, name) for name in ("features", "values", "row_node", "bias", "preactivation")},
        **{name: getattr(graph.rows, name) for name in ("row_ptr", "column", "weight")},
        "dropped": graph.dropped, "dropped_mass": graph.dropped_mass, "token_ids": graph.tokens.ids,
        "product_norm": graph.product_norm,
        "target_ids": graph.targets.ids, "target_weights": graph.targets.weights,
        "target_positions": graph.targets.positions,
    }  # fmt: skip
    metadata = {
        "version": VERSION, "layers": graph.layers, "prompt": graph.prompt, "vocab_size": graph.vocab_size,
        "target_labels": graph.targets.labels, "token_text": graph.tokens.text, "timings": graph.timings,
        "provenance": graph.provenance,
        **{name: [[*key, text] for key, text in getattr(graph, name).items()] for name in _LABELS},
    }  # fmt: skip
    tensors = {name: fields[name] for name in _TENSORS}
    header = {_KEY: json.dumps(metadata, allow_nan=False)}
    replace_file(_SAVE, writable(_SAVE, path), lambda file: write_tensors(file, tensors, header))


def load(graph_type: type[Graph], path: str | os.PathLike[str]) -> Graph:
    """Read a graph from a safetensors file."""
    path = Path(path)
    metadata, tensors = _read(path)
    arrays = ("features", "values", "row_node", "bias", "preactivation", "dropped", "dropped_mass", "product_norm")
    plain = ("layers", "prompt", "vocab_size", "timings", "provenance")
    fields: dict[str, Any] = {name: tensors.get(name) for name in arrays} | {name: metadata[name] for name in plain}
    try:
        labels: dict[str, Any] = {
            name: {(layer, feature): text for layer, feature, text in metadata.get(name, [])} for name in _LABELS
        }
        rows = Rows(tensors["row_ptr"], tensors["column"], tensors["weight"])
        targets = Targets(
            metadata["target_labels"], tensors["target_ids"], tensors["target_weights"], tensors["target_positions"]
        )
        tokens = Tokens(tensors["token_ids"], metadata["token_text"])
        return graph_type(rows=rows, targets=targets, tokens=tokens, **labels, **fields)
    except (TypeError, ValueError) as error:
        raise GraphFileError(f"Graph.load: {path} must hold a sound graph, got: {error}") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"Graph.load: path must be a file, got {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _metadata(path, file.metadata())
            present = set(file.keys())
            missing, extra = sorted(_TENSORS.keys() - _OPTIONAL - present), sorted(present - _TENSORS.keys())
            if missing or extra:
                raise GraphFileError(f"Graph.load: {path} must hold a graph's tensors, got {missing=}, {extra=}")
            tensors = {name: _empty_tensor(path, name, file.get_slice(name)) for name in _TENSORS.keys() & present}
        _read_tensors(path, tensors)
    except (SafetensorError, OSError) as error:
        raise GraphFileError(
            f"Graph.load: {path} must be a whole safetensors file, got {path.stat().st_size} bytes: {error}"
        ) from None
    return metadata, tensors


def _empty_tensor(path: Path, name: str, stored: Any) -> Tensor:
    """An uninitialized tensor of the dtype and shape that the file states."""
    dtype = _NAMES.get(stored.get_dtype())
    if dtype not in _TENSORS[name]:
        got = dtype or stored.get_dtype()
        raise GraphFileError(f"Graph.load: {path}: {name} must be {_TENSORS[name][0]}, got {got}")
    return torch.empty(stored.get_shape(), dtype=dtype, device="cpu")


def _read_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read tensors of a file whose header is sound; a mapped file would occupy memory beside the copies."""
    try:
        entries = tensor_entries(path, "Graph.load")
    except ValueError as error:
        raise GraphFileError(str(error)) from None
    with path.open("rb") as file:
        for name, t in tensors.items():
            file.seek(entries[name].offset)
            if file.readinto(t.numpy().reshape(-1).view(np.uint8).data) != t.nbytes:
                raise OSError(f"{name} ends early")


def _metadata(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    if _KEY not in (metadata or {}):
        raise GraphFileError(f"Graph.load: {path} must be a graph saved by pycircuit, got another safetensors file")
    try:
        content = json.loads((metadata or {})[_KEY])
    except (ValueError, RecursionError) as error:
        raise GraphFileError(f"Graph.load: {path}: metadata must be JSON: {error}") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        got = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise GraphFileError(f"Graph.load: {path} must be of version {VERSION}, got {got!r}")
    for name, kind in _TEXTS.items():
        if type(content.get(name)) is not kind:
            raise GraphFileError(
                f"Graph.load: {path}: {name} must be a {kind.__name__}, got {type(content.get(name)).__name__}"
            )
    return content
