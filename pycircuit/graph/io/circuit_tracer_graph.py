"""circuit-tracer's saved graphs, `.pt`: read without running anything they hold, and written without circuit-tracer.

Such a file is a pickle in a zip archive (see torch_archive): plain values, tensors, and the few classes below, which
stand-ins replace that only store their fields. It has the edges between selected features, errors, tokens and
targets, but neither biases nor pre-activations.
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
from pycircuit.graph.endpoints import Targets, Tokens
from pycircuit.ops import checks

from .graph_file import GraphFileError
from .torch_archive import Archive, StandIn, StoredTensor, stand_in

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

_CONFIG = ("n_layers", "d_model", "d_head", "n_heads", "d_mlp", "d_vocab", "tokenizer_name", "model_name",
           "original_architecture", "n_key_value_heads")  # fmt: skip
_FLOATS, _INTS = checks.FLOATS, (torch.int64, torch.int32)


class LogitTarget(NamedTuple):
    token_str: str
    vocab_idx: int


LogitTarget.__module__ = "circuit_tracer.attribution.targets"
UnifiedConfig = stand_in("circuit_tracer.utils.tl_nnsight_mapping.UnifiedConfig")
_CLASSES: list[Any] = [LogitTarget, UnifiedConfig, *map(stand_in, (
    "transformer_lens.HookedTransformerConfig.HookedTransformerConfig",  # of before UnifiedConfig
    "transformer_lens.config.HookedTransformerConfig.HookedTransformerConfig",
))]  # fmt: skip
_KNOWN = {f"{library_class.__module__}.{library_class.__name__}": library_class for library_class in _CLASSES}


def load(graph_type: type[Graph], path: str | os.PathLike[str], tokenizer: Any) -> Graph:
    path = Path(path)
    op = f"Graph.from_circuit_tracer: {path}"
    if not path.is_file():
        raise FileNotFoundError(f"Graph.from_circuit_tracer: path must be a file, got {path}")
    archive = Archive(op, path)
    content = archive.values(_KNOWN)
    if type(content) is not dict:
        raise GraphFileError(f"{op} must hold names and values, got {type(content).__name__}")
    try:
        return _graph(graph_type, archive, content, tokenizer)
    except (TypeError, ValueError, KeyError) as error:
        raise GraphFileError(f"{op} must hold a sound graph, got: {error}") from None


def _tensor(
    archive: Archive, content: dict[str, Any], name: str, allowed: tuple[torch.dtype, ...], ndim: int
) -> Tensor:
    stored = content[name]
    if not isinstance(stored, StoredTensor):
        raise TypeError(f"{name} must be a plain tensor, got {type(stored).__name__}")
    if stored.storage.dtype not in allowed or len(stored.size) != ndim:
        got = f"{stored.storage.dtype} of {list(stored.size)}"
        raise TypeError(f"{name} must be {ndim}-dimensional and one of {allowed}, got {got}")
    return archive.tensor(name, stored)


def _graph(graph_type: type[Graph], archive: Archive, content: dict[str, Any], tokenizer: Any) -> Graph:
    """Make the graph, with copies of the file's tensors."""
    tensor = partial(_tensor, archive, content)
    features = tensor("active_features", _INTS, 2).to(torch.int64, copy=True).contiguous()
    values = tensor("activation_values", _FLOATS, 1)
    selected = tensor("selected_features", _INTS, 1).long()
    ids = tensor("input_tokens", _INTS, 1).to(torch.int64, copy=True)
    weights = tensor("logit_probabilities", _FLOATS, 1)
    matrix = tensor("adjacency_matrix", _FLOATS, 2)
    config = _config(content["cfg"])
    layers, vocab_size = config.get("n_layers"), content.get("vocab_size", config.get("d_vocab"))
    layers, vocab_size = checks.whole("cfg", "n_layers", layers, 1), checks.whole("graph", "vocab_size", vocab_size, 0)
    labels, tokens = _targets(tensor, content, vocab_size, tokenizer)
    checks.bounded("graph", "selected_features", selected, 0, len(features), f"from 0 to below {len(features)}")
    rows, row_node = _rows(matrix, features, selected, (layers + 1) * len(ids), len(labels))
    position = torch.full((len(labels),), max(0, len(ids) - 1))
    return graph_type(
        features=features,
        values=(values if values.dtype == torch.float64 else values.float()).clone(),
        rows=rows,
        row_node=row_node,
        bias=torch.zeros(rows.count, dtype=torch.float64),
        preactivation=torch.from_numpy(rows.sums(rows.weight.numpy())),
        targets=Targets(labels, tokens, weights.to(torch.float64, copy=True), position),
        tokens=Tokens(ids, [_text(tokenizer, token) for token in ids.tolist()]),
        layers=layers,
        prompt=content["input_string"],
        vocab_size=vocab_size,
        provenance={"law": "unknown", "circuit_tracer": config, **_names(content, config)},
    )


def _config(config: Any) -> dict[str, Any]:
    """Fields of a UnifiedConfig that are numbers or names."""
    if not isinstance(config, StandIn):
        raise TypeError(
            f"cfg must be a configuration of circuit-tracer or TransformerLens, got {type(config).__name__}"
        )
    return {name: value for name in _CONFIG if isinstance(value := vars(config).get(name), int | str)}


def _names(content: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    scan = content.get("scan_name", content.get("scan"))  # since July 2026, and before
    if not all(isinstance(name, str) for name in (scan if type(scan) is list else [scan] if scan is not None else [])):
        raise TypeError(f"scan must be a string or a list of strings, got {type(scan).__name__}")
    names = {"model": config.get("model_name"), "scan": scan}
    return {name: value for name, value in names.items() if value is not None}


def _text(tokenizer: Any, token: int) -> str:
    return str(token) if tokenizer is None else str(tokenizer.decode([token]))


def _targets(
    tensor: Callable[..., Tensor], content: dict[str, Any], vocab_size: int, tokenizer: Any
) -> tuple[list[str], Tensor]:
    """(labels, token ids, -1 for a target that is no token); older files have ids alone."""
    name = "logit_targets" if "logit_targets" in content else "logit_tokens"
    targets = content[name]
    if isinstance(targets, StoredTensor):
        ids = tensor(name, _INTS, 1).tolist()
        labels = [_text(tokenizer, i) for i in ids]
    else:
        if not isinstance(targets, list) or not all(isinstance(t, LogitTarget) for t in targets):
            raise TypeError(f"logit_targets must be LogitTargets, got {type(targets).__name__}")
        ids = [checks.whole("logit_targets", "vocab_idx", t.vocab_idx, 0) for t in targets]
        labels = [t.token_str for t in targets]
    if vocab_size:
        ids = [i if i < vocab_size else -1 for i in ids]
    return labels, torch.tensor(ids, dtype=torch.int64)


def _rows(
    matrix: Tensor, features: Tensor, selected: Tensor, errors_and_tokens: int, targets: int
) -> tuple[Rows, Tensor]:
    """(rows of the selected features and of the targets, their nodes), with every active feature a column."""
    count, nodes = len(selected), len(selected) + errors_and_tokens + targets
    if matrix.shape != (nodes, nodes):
        rule = (
            f"[{nodes}, {nodes}] ({count} selected features, {errors_and_tokens} errors and tokens, {targets} targets)"
        )
        raise ValueError(f"adjacency_matrix must be {rule}, got {list(matrix.shape)}")
    if len(selected.unique()) != count:
        raise ValueError("selected_features must be distinct, got one twice")
    if matrix[count : nodes - targets].any() or matrix[:, nodes - targets :].any():
        raise ValueError("adjacency_matrix must have no edge into errors and tokens or out of targets, got one")
    order = torch.cat([selected.argsort(), torch.arange(count, nodes)])
    column_node = torch.cat([selected.sort().values, len(features) + torch.arange(errors_and_tokens + targets)])
    row_index = torch.cat([torch.arange(count), torch.arange(nodes - targets, nodes)])
    block = matrix[order[row_index]]
    if count and not torch.equal(order[:count], torch.arange(count)):
        block = block[:, order]
    rows, _, _ = Rows.from_dense(block if block.dtype == torch.float64 else block.float())
    column = column_node[rows.column.long()].to(torch.int32)
    return Rows.trusted(rows.row_ptr, column, rows.weight), column_node[row_index]


def save(graph: Graph, path: str | os.PathLike[str], tokenizer_name: str | None, scan: str | None) -> None:
    """Write a `.pt` graph for circuit-tracer."""
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
    selected = graph.row_node[graph.row_node < graph.first_error].sort().values
    ids = graph.targets.ids.tolist()
    virtual = [i if i >= 0 else graph.vocab_size + target for target, i in enumerate(ids)]
    content = {
        "input_string": graph.prompt,
        "adjacency_matrix": _matrix(graph, selected),
        "cfg": _unified(graph, tokenizer_name),
        "active_features": graph.features,
        "logit_targets": [LogitTarget(*pair) for pair in zip(graph.targets.labels, virtual, strict=True)],
        "logit_probabilities": graph.targets.weights.to(graph.rows.weight.dtype),
        "vocab_size": graph.vocab_size,
        "input_tokens": graph.tokens.ids,
        "selected_features": selected,
        "activation_values": graph.values,
        "scan": graph.provenance.get("scan") if scan is None else scan,  # every version reads this name, few the later
    }
    pickling: Any = SimpleNamespace(__name__="pickle", Pickler=_Writer)
    replace_file(op, into, lambda file: _pickled(content, file, pickling))


def _pickled(content: dict[str, Any], file: BinaryIO, pickling: Any) -> None:
    """Run torch.save into an open file: it would name the archive after a path, and other names make other bytes.

    torch.save hides an error of the system behind one about positions in its archive.
    """
    try:
        torch.save(content, file, pickle_module=pickling)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _matrix(graph: Graph, selected: Tensor) -> Tensor:
    """Edges among the nodes of circuit-tracer's graph, without other features: [nodes, nodes]."""
    index = torch.full((graph.nodes,), -1)
    nodes = torch.cat([selected, torch.arange(graph.first_error, graph.nodes)])
    index[nodes] = torch.arange(len(nodes))
    out = graph.rows.weight.new_zeros(len(nodes), len(nodes))
    for r, node in enumerate(index[graph.row_node].tolist()):
        column, weight = graph.rows.row(r)
        source = index[column.long()]
        out[node, source[source >= 0]] = weight[source >= 0]
    return out


def _unified(graph: Graph, tokenizer_name: str | None) -> StandIn:
    """Configuration of the graph's model as a UnifiedConfig; unknown fields are None."""
    config = UnifiedConfig()
    model = graph.provenance.get("model")
    vars(config).update(dict.fromkeys((*_CONFIG, "dtype")))
    vars(config).update(graph.provenance.get("circuit_tracer", {"model_name": model, "tokenizer_name": model}))
    vars(config).update({"n_layers": graph.layers, "d_vocab": graph.vocab_size})
    if tokenizer_name is not None:
        vars(config)["tokenizer_name"] = tokenizer_name
    return config


_Pickler: Any = pickle._Pickler  # the implementation in Python, whose methods can be overridden


class _Writer(_Pickler):
    """Pickler that writes stand-ins under the names of circuit-tracer's classes, which need not be installed."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the name of a class or a function."""
        if obj in (LogitTarget, UnifiedConfig):
            self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__qualname__}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)
