"""circuit-tracer's saved graphs, `.pt`: read without running anything they hold, and written without circuit-tracer.

Such a file is a pickle in a zip archive (see archive): plain values, tensors, and the few classes below, in whose
place stand our own, which only keep what they are given. It holds the edges between the features that
were selected, errors, tokens and targets, and neither the biases nor the pre-activations that rows should add up to.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from pycircuit.files.atomic import replace_file, writable
from pycircuit.graph.csr import Rows
from pycircuit.ops import checks

from .graph_file import GraphFileError
from .torch_archive import Archive, Standin, Stored, standin

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

_CONFIG = ("n_layers", "d_model", "d_head", "n_heads", "d_mlp", "d_vocab", "tokenizer_name", "model_name",
           "original_architecture", "n_key_value_heads")  # fmt: skip
_FLOATS, _INTS = checks.FLOATS, (torch.int64, torch.int32)


class LogitTarget(NamedTuple):
    token_str: str
    vocab_idx: int


LogitTarget.__module__ = "circuit_tracer.attribution.targets"
UnifiedConfig = standin("circuit_tracer.utils.tl_nnsight_mapping.UnifiedConfig")
_CLASSES: list[Any] = [LogitTarget, UnifiedConfig, *map(standin, (
    "transformer_lens.HookedTransformerConfig.HookedTransformerConfig",  # of before UnifiedConfig
    "transformer_lens.config.HookedTransformerConfig.HookedTransformerConfig",
))]  # fmt: skip
_KNOWN = {f"{of.__module__}.{of.__name__}": of for of in _CLASSES}


def load(kind: type[Graph], path: str | os.PathLike[str], tokenizer: Any) -> Graph:
    path = Path(path)
    op = f"Graph.from_circuit_tracer: {path}"
    if not path.is_file():
        raise FileNotFoundError(f"Graph.from_circuit_tracer: path must be a file, got {path}")
    archive = Archive(op, path)
    found = archive.values(_KNOWN)
    if type(found) is not dict:
        raise GraphFileError(f"{op} must hold names and values, got {type(found).__name__}")
    try:
        return _graph(kind, archive, found, tokenizer)
    except (TypeError, ValueError, KeyError) as error:
        raise GraphFileError(f"{op} must hold a sound graph, got: {error}") from None


def _tensor(archive: Archive, found: dict[str, Any], name: str, allowed: tuple[torch.dtype, ...], ndim: int) -> Tensor:
    of = found[name]
    if not isinstance(of, Stored):
        raise TypeError(f"{name} must be a plain tensor, got {type(of).__name__}")
    if of.storage.dtype not in allowed or len(of.size) != ndim:
        got = f"{of.storage.dtype} of {list(of.size)}"
        raise TypeError(f"{name} must be {ndim}-dimensional and one of {allowed}, got {got}")
    return archive.tensor(name, of)


def _graph(kind: type[Graph], archive: Archive, found: dict[str, Any], tokenizer: Any) -> Graph:
    """What is kept is copied: the file's pages go with the file."""
    from pycircuit.graph.graph import Targets, Tokens

    tensor = partial(_tensor, archive, found)
    features = tensor("active_features", _INTS, 2).to(torch.int64, copy=True).contiguous()
    values = tensor("activation_values", _FLOATS, 1)
    chosen = tensor("selected_features", _INTS, 1).long()
    ids = tensor("input_tokens", _INTS, 1).to(torch.int64, copy=True)
    weights = tensor("logit_probabilities", _FLOATS, 1)
    matrix = tensor("adjacency_matrix", _FLOATS, 2)
    config = _config(found["cfg"])
    layers, vocab_size = config.get("n_layers"), found.get("vocab_size", config.get("d_vocab"))
    layers, vocab_size = (
        checks.whole_number("cfg", "n_layers", layers, 1),
        checks.whole_number("graph", "vocab_size", vocab_size, 0),
    )
    labels, tokens = _targets(tensor, found, vocab_size, tokenizer)
    checks.bounded("graph", "selected_features", chosen, 0, len(features), f"from 0 to below {len(features)}")
    rows, row_node = _rows(matrix, features, chosen, (layers + 1) * len(ids), len(labels))
    at = torch.full((len(labels),), max(0, len(ids) - 1))
    return kind(
        features=features,
        values=(values if values.dtype == torch.float64 else values.float()).clone(),
        rows=rows,
        row_node=row_node,
        bias=torch.zeros(rows.count, dtype=torch.float64),
        preactivation=torch.from_numpy(rows.sums(rows.weight.numpy())),
        targets=Targets(labels, tokens, weights.to(torch.float64, copy=True), at),
        tokens=Tokens(ids, [_text(tokenizer, at) for at in ids.tolist()]),
        layers=layers,
        prompt=found["input_string"],
        vocab_size=vocab_size,
        provenance={"law": "unknown", "circuit_tracer": config, **_names(found, config)},
    )


def _config(config: Any) -> dict[str, Any]:
    """The fields that a UnifiedConfig has and that are numbers or names."""
    if not isinstance(config, Standin):
        raise TypeError(
            f"cfg must be a configuration of circuit-tracer or TransformerLens, got {type(config).__name__}"
        )
    return {name: v for name in _CONFIG if isinstance(v := vars(config).get(name), int | str)}


def _names(found: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    scan = found.get("scan_name", found.get("scan"))  # since July 2026, and before
    if not all(isinstance(one, str) for one in (scan if type(scan) is list else [scan] if scan is not None else [])):
        raise TypeError(f"scan must be a string or a list of strings, got {type(scan).__name__}")
    names = {"model": config.get("model_name"), "scan": scan}
    return {name: value for name, value in names.items() if value is not None}


def _text(tokenizer: Any, token: int) -> str:
    return str(token) if tokenizer is None else str(tokenizer.decode([token]))


def _targets(
    tensor: Callable[..., Tensor], found: dict[str, Any], vocab_size: int, tokenizer: Any
) -> tuple[list[str], Tensor]:
    """(labels, token ids, -1 for what is no token); older files hold ids alone."""
    given = found["logit_targets"] if "logit_targets" in found else found["logit_tokens"]
    if isinstance(given, Stored):
        ids = tensor("logit_targets" if "logit_targets" in found else "logit_tokens", _INTS, 1).tolist()
        labels = [_text(tokenizer, i) for i in ids]
    else:
        if not isinstance(given, list) or not all(isinstance(t, LogitTarget) for t in given):
            raise TypeError(f"logit_targets must be LogitTargets, got {type(given).__name__}")
        ids = [checks.whole_number("logit_targets", "vocab_idx", t.vocab_idx, 0) for t in given]
        labels = [t.token_str for t in given]
    if vocab_size:
        ids = [i if i < vocab_size else -1 for i in ids]
    return labels, torch.tensor(ids, dtype=torch.int64)


def _rows(matrix: Tensor, features: Tensor, chosen: Tensor, between: int, targets: int) -> tuple[Rows, Tensor]:
    """(rows of the selected features and of the targets, their nodes) with every active feature a column."""
    count, nodes = len(chosen), len(chosen) + between + targets
    if matrix.shape != (nodes, nodes):
        rule = f"[{nodes}, {nodes}] ({count} selected features, {between} errors and tokens, {targets} targets)"
        raise ValueError(f"adjacency_matrix must be {rule}, got {list(matrix.shape)}")
    if len(chosen.unique()) != count:
        raise ValueError("selected_features must be distinct, got one twice")
    if matrix[count : nodes - targets].any() or matrix[:, nodes - targets :].any():
        raise ValueError("adjacency_matrix must have no edge into errors and tokens or out of targets, got one")
    order = torch.cat([chosen.argsort(), torch.arange(count, nodes)])
    place = torch.cat([chosen.sort().values, len(features) + torch.arange(between + targets)])
    kept = torch.cat([torch.arange(count), torch.arange(nodes - targets, nodes)])
    part = matrix[order[kept]]
    if count and not torch.equal(order[:count], torch.arange(count)):
        part = part[:, order]
    rows, _, _ = Rows.from_dense(part if part.dtype == torch.float64 else part.float())
    return Rows.trusted(rows.row_ptr, place[rows.column.long()].to(torch.int32), rows.weight), place[kept]


def save(graph: Graph, path: str | os.PathLike[str], tokenizer_name: str | None, scan: str | None) -> None:
    op = "Graph.to_circuit_tracer"
    into = writable(op, path)
    for name, value in (("tokenizer_name", tokenizer_name), ("scan", scan)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{op}: {name} must be a string, got {type(value).__name__}")
    last = graph.positions - 1
    if not bool((graph.targets.positions == last).all()):
        got = sorted(set(graph.targets.positions.tolist()))
        raise ValueError(
            f"{op}: targets must be at the last position, {last}, as all of circuit-tracer's are, got {got}; trace the "
            "prompt up to a position to have it as the last: its edges are the same"
        )
    chosen = graph.row_node[graph.row_node < graph.first_error].sort().values
    ids = graph.targets.ids.tolist()
    virtual = [i if i >= 0 else graph.vocab_size + at for at, i in enumerate(ids)]
    held = {
        "input_string": graph.prompt,
        "adjacency_matrix": _matrix(graph, chosen),
        "cfg": _unified(graph, tokenizer_name),
        "active_features": graph.features,
        "logit_targets": [LogitTarget(*pair) for pair in zip(graph.targets.labels, virtual, strict=True)],
        "logit_probabilities": graph.targets.weights.to(graph.rows.weight.dtype),
        "vocab_size": graph.vocab_size,
        "input_tokens": graph.tokens.ids,
        "selected_features": chosen,
        "activation_values": graph.values,
        "scan": graph.provenance.get("scan") if scan is None else scan,  # every version reads this name, few the later
    }
    pickling: Any = SimpleNamespace(__name__="pickle", Pickler=_Writer)
    replace_file(op, into, lambda file: _pickled(held, file, pickling))


def _pickled(content: dict[str, Any], file: BinaryIO, pickling: Any) -> None:
    """torch.save into an open file: it would name the archive after a path, and other names make other bytes.

    It hides the system's error behind one about positions in its archive.
    """
    try:
        torch.save(content, file, pickle_module=pickling)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _matrix(graph: Graph, chosen: Tensor) -> Tensor:
    """Edges among the nodes that circuit-tracer keeps: [nodes, nodes]. What comes from other features is left out."""
    place = torch.full((graph.nodes,), -1)
    kept = torch.cat([chosen, torch.arange(graph.first_error, graph.nodes)])
    place[kept] = torch.arange(len(kept))
    out = graph.rows.weight.new_zeros(len(kept), len(kept))
    for r, node in enumerate(place[graph.row_node].tolist()):
        column, weight = graph.rows.row(r)
        at = place[column.long()]
        out[node, at[at >= 0]] = weight[at >= 0]
    return out


def _unified(graph: Graph, tokenizer_name: str | None) -> Standin:
    """What is not known of the model is None."""
    config = UnifiedConfig()
    model = graph.provenance.get("model")
    vars(config).update(dict.fromkeys((*_CONFIG, "dtype")))
    vars(config).update(graph.provenance.get("circuit_tracer", {"model_name": model, "tokenizer_name": model}))
    vars(config).update({"n_layers": graph.layers, "d_vocab": graph.vocab_size})
    if tokenizer_name is not None:
        vars(config)["tokenizer_name"] = tokenizer_name
    return config


_Pickler: Any = pickle._Pickler  # the one in Python, whose parts can be replaced


class _Writer(_Pickler):
    """Writes our stand-ins under the names of what they stand for, which need not be installed."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """obj: a class or a function."""
        if obj in (LogitTarget, UnifiedConfig):
            self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__qualname__}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)
