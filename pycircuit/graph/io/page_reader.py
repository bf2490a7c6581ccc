"""Reader of the JSON that circuit-tracer's page and Neuronpedia's show, whoever wrote it.

Such a file has the nodes and edges that pruning left. Sizes are checked before anything is allocated by them, and what
is wrong is an error that names the file and the field.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from math import isfinite, isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from pycircuit.graph.csr import Rows
from pycircuit.graph.endpoints import Targets, Tokens

from .graph_file import GraphFileError
from .page_json import AUTOMATIC, PAGE

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

_OP = "Graph.from_json"
MAX_BYTES = 128 << 20  # Neuronpedia takes 100 MB
_MAX_OBJECTS = 1 << 22  # objects and lists: an empty list takes two bytes in the file and seventy in memory
_MAX_LAYERS, _MAX_ERRORS = 1 << 12, 1 << 24  # layers; layers x positions, each a node
_MAX_NUMBER = 1 << 80  # of a feature, paired with its layer

_LAYER = re.compile(r"\d{1,6}", re.ASCII)
_ID = re.compile(r"(\d{1,6})_(\d{1,13})_(\d{1,9})", re.ASCII)
_SHARED_ID = re.compile(r"(\d{1,6})_(\d{1,13})-.*", re.ASCII | re.DOTALL)
_TOKEN_ID = re.compile(r"E_(\d{1,18})_\d{1,9}", re.ASCII)
_LABELS = (re.compile(r'Output "(.*)" \(p ?=', re.DOTALL), re.compile(r"[Oo]utput:? '(.*)' \(p ?=", re.DOTALL))
_PROBABILITY = re.compile(r"\(p=([0-9.eE+-]{1,30})\)")
_ATTENTION = ("lorsa", "lorsa error")


def load(graph_type: type[Graph], path: str | os.PathLike[str]) -> Graph:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{_OP}: path must be a file, got {path}")
    content = _content(path)
    try:
        return _graph(graph_type, content)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        message = str(error) if len(str(error)) <= 500 else f"{str(error)[:500]}..."
        raise GraphFileError(f"{_OP}: {path} must hold a sound graph, got: {message}") from None


def _content(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise GraphFileError(f"{_OP}: {path} must have at most {MAX_BYTES >> 20} MB, got {size >> 20}")
    data = path.read_bytes()
    if (objects := data.count(b"{") + data.count(b"[")) > _MAX_OBJECTS:
        raise GraphFileError(f"{_OP}: {path} must have at most {_MAX_OBJECTS} objects and lists, got {objects}")
    try:
        content = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise GraphFileError(f"{_OP}: {path} must be JSON, got: {str(error)[:200]}") from None
    names = ("metadata", "nodes", "links")
    if not isinstance(content, dict) or any(name not in content for name in names):
        got = ", ".join(sorted(map(str, content))[:8])[:200] if isinstance(content, dict) else type(content).__name__
        raise GraphFileError(f"{_OP}: {path} must have {', '.join(names)}, got {got or 'nothing'}")
    return content


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"numbers must be finite, got {text}")


def _field(owner: Any, place: str, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """Value of a field of a known kind. default: for a field that is absent or null; None: there must be one."""
    if not isinstance(owner, dict):
        raise TypeError(f"{place} must be an object, got {type(owner).__name__}")
    value = owner.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"{place}.{name} must be {names}, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return type(value).__name__
    return repr(value)[:80]


def _number(owner: dict[str, Any], place: str, name: str) -> float:
    """Finite value of a field; 0 for an absent one."""
    value = float(_field(owner, place, name, (int, float), 0.0))
    if not isfinite(value):
        raise ValueError(f"{place}.{name} must be finite, got {value}")
    return value


@dataclass
class _Nodes:
    """Nodes of a file by kind, each with its node_id."""

    positions: int
    features: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    errors: dict[str, tuple[int, int]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    token_ids: dict[int, int] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: dict[tuple[int, int], str] = field(default_factory=dict)
    automatic_labels: dict[tuple[int, int], str] = field(default_factory=dict)
    logit_layer: int = 0

    def add(self, node: Any, place: str) -> None:
        node_id, kind = _field(node, place, "node_id", str), _field(node, place, "feature_type", str)
        position = _field(node, place, "ctx_idx", int)
        if not 0 <= position < self.positions:
            raise ValueError(f"{place}.ctx_idx must be below the {self.positions} prompt_tokens, got {position}")
        if any(node_id in ids for ids in (self.features, self.errors, self.tokens, self.targets)):
            raise ValueError(
                f"{place}.node_id must be its own, got {node_id[:80]!r} twice (files of circuit-tracer before July "
                "2026 name an error like a feature of layer 0)"
            )
        if kind in _ATTENTION:
            raise ValueError(f"{place}.feature_type must be of a transcoder, error, embedding or logit, got {kind}")
        if kind == "logit":
            self._add_target(node, place, node_id)
        elif kind == "embedding":
            match = _TOKEN_ID.fullmatch(node_id)
            self.tokens[node_id] = position
            if match:
                self.token_ids[position] = int(match[1])
        elif kind == "mlp reconstruction error":
            self.errors[node_id] = (_layer(node, place), position)
        else:
            self._add_feature(node, place, node_id, _layer(node, place), position)

    def _add_target(self, node: dict[str, Any], place: str, node_id: str) -> None:
        self.targets[node_id] = node
        layer = str(node.get("layer"))
        if _LAYER.fullmatch(layer):
            self.logit_layer = max(self.logit_layer, _checked_layer(int(layer), place))

    def _add_feature(self, node: dict[str, Any], place: str, node_id: str, layer: int, position: int) -> None:
        feature = _feature_index(node, place, node_id, layer, position)
        self.features[node_id] = (layer, position, feature)
        self.values.append(_number(node, place, "activation"))
        label = _field(node, place, "clerp", str, "")
        if label:
            labels = self.automatic_labels if label.endswith(AUTOMATIC) else self.labels
            labels.setdefault((layer, feature), label.removesuffix(AUTOMATIC))


def _layer(node: dict[str, Any], place: str) -> int:
    layer = _field(node, place, "layer", (str, int))
    if not _LAYER.fullmatch(str(layer)):
        raise ValueError(f"{place}.layer must be a number from 0, got {_short(layer)}")
    return _checked_layer(int(layer), place)


def _checked_layer(layer: int, place: str) -> int:
    if layer >= _MAX_LAYERS:
        raise ValueError(f"{place}.layer must be below {_MAX_LAYERS}, got {layer}")
    return layer


def unpaired(number: int) -> tuple[int, int]:
    """Return layer and feature of the number that pairs them (Cantor's)."""
    diagonal = (isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def _feature_index(node: dict[str, Any], place: str, node_id: str, layer: int, position: int) -> int:
    """Index of a feature in its layer: from its ids, where they agree with layer and position, or its number."""
    match = _ID.fullmatch(node_id)
    if match and (int(match[1]), int(match[3])) == (layer, position):
        return int(match[2])
    match = _SHARED_ID.fullmatch(_field(node, place, "jsNodeId", str, ""))
    if match and int(match[1]) == layer:
        return int(match[2])
    number = _field(node, place, "feature", int)
    if not 0 <= number < _MAX_NUMBER:
        raise ValueError(f"{place}.feature must be from 0 to below 2**80, got {_short(number)}")
    paired_layer, feature = unpaired(number)
    return feature if paired_layer == layer else int(number)


def _graph(graph_type: type[Graph], content: dict[str, Any]) -> Graph:
    metadata = _field(content, "file", "metadata", dict)
    texts = _field(metadata, "metadata", "prompt_tokens", list)
    entries, links = (_field(content, "file", name, list) for name in ("nodes", "links"))
    nodes = _Nodes(len(texts))
    for i, node in enumerate(entries):
        nodes.add(node, f"nodes[{i}]")
    ends = [_ends(link, f"links[{i}]") for i, link in enumerate(links)]
    settings = _field(metadata, "metadata", "generation_settings", dict, {})
    layers = _layers(nodes, {source for source, _, _ in ends}, settings)
    if (layers + 1) * len(texts) > _MAX_ERRORS:
        raise ValueError(f"layers times prompt_tokens must be at most {_MAX_ERRORS}, got {layers} times {len(texts)}")
    vocab_size = max(0, _field(settings, "generation_settings", "vocab_size", int, 0))
    numbers = _numbers(nodes, layers)
    rows, row_node = _rows(nodes, numbers, ends)
    parameters = _field(content, "file", "qParams", dict, {})
    return graph_type(
        features=torch.tensor(list(nodes.features.values()), dtype=torch.int64).reshape(-1, 3),
        values=torch.tensor(nodes.values, dtype=torch.float64),
        rows=rows,
        row_node=row_node,
        bias=torch.zeros(rows.count, dtype=torch.float64),
        preactivation=torch.from_numpy(rows.sums(rows.weight.numpy())),
        targets=_targets(nodes, vocab_size),
        tokens=Tokens(torch.tensor([nodes.token_ids.get(p, 0) for p in range(len(texts))], dtype=torch.int64), texts),
        layers=layers,
        prompt=_field(metadata, "metadata", "prompt", str, "".join(map(str, texts))),
        vocab_size=vocab_size,
        provenance=_provenance(metadata, parameters, nodes),
        labels=nodes.labels | _edited_labels(parameters),
        automatic_labels=nodes.automatic_labels,
    )


def _ends(link: Any, place: str) -> tuple[str, str, float]:
    source, target = (_field(link, place, name, str) for name in ("source", "target"))
    if link.get("weight") is None:
        raise TypeError(f"{place}.weight must be int or float, got None")
    return source, target, _number(link, place, "weight")


def _layers(nodes: _Nodes, sources: set[str], settings: dict[str, Any]) -> int:
    """Layers of the model: as the file says, or enough for its nodes and two below that of the logits' number."""
    layers = [layer for layer, _, _ in nodes.features.values()]
    layers += [layer for node_id, (layer, _) in nodes.errors.items() if node_id in sources]
    least = max(layers, default=-1) + 1
    stated = _field(settings, "generation_settings", "layers", int, 0)
    return max(least, _checked_layer(stated, "generation_settings") if stated > 0 else nodes.logit_layer - 1)


def _numbers(nodes: _Nodes, layers: int) -> dict[str, int]:
    """Node of each node_id, errors without links above the last layer aside."""
    first_error = len(nodes.features)
    first_token = first_error + layers * nodes.positions
    numbers = {node_id: i for i, node_id in enumerate(nodes.features)}
    for node_id, (layer, position) in nodes.errors.items():
        if layer < layers:
            numbers[node_id] = first_error + layer * nodes.positions + position
    numbers |= {node_id: first_token + position for node_id, position in nodes.tokens.items()}
    if len(set(numbers.values())) < len(numbers):
        raise ValueError("nodes must have one error for a layer and position and one embedding for a position, got two")
    first_target = first_token + nodes.positions
    return numbers | {node_id: first_target + i for i, node_id in enumerate(nodes.targets)}


def _rows(nodes: _Nodes, numbers: dict[str, int], links: list[tuple[str, str, float]]) -> tuple[Rows, torch.Tensor]:
    """(rows of the nodes that links enter and of all targets, their nodes)."""
    for i, (source, target, _) in enumerate(links):
        for name, node_id, known in (("source", source, numbers), ("target", target, numbers)):
            if node_id not in known:
                raise ValueError(f"links[{i}].{name} must be a node_id, got {node_id[:80]!r}")
        if source in nodes.targets or not (target in nodes.features or target in nodes.targets):
            raise ValueError(f"links[{i}] must enter a feature or logit and leave none, got {source!r} to {target!r}")
    pairs = np.array([(numbers[source], numbers[target]) for source, target, _ in links], np.int64).reshape(-1, 2)
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))
    column, entered = pairs[order].T
    weight = np.array([weight for _, _, weight in links], np.float64)[order]
    twice = (column[1:] == column[:-1]) & (entered[1:] == entered[:-1])
    if twice.any():
        raise ValueError(f"links must name a pair of nodes once, got {links[order[int(twice.argmax())]][:2]} twice")
    row_node = np.union1d(entered, [numbers[node_id] for node_id in nodes.targets]).astype(np.int64)
    row_ptr = np.r_[np.searchsorted(entered, row_node), len(entered)].astype(np.int64)
    rows = Rows(*map(torch.from_numpy, (row_ptr, column.astype(np.int32), weight)))
    return rows, torch.from_numpy(row_node)


def _targets(nodes: _Nodes, vocab_size: int) -> Targets:
    labels, ids, weights = [], [], []
    for node_id, node in nodes.targets.items():
        text = _field(node, node_id, "clerp", str, "")
        label = next((match[1] for form in _LABELS if (match := form.match(text))), text)
        number = _field(node, node_id, "feature", int, -1)
        labels.append(label or str(number))
        ids.append(number if 0 <= number < (vocab_size or 1 << 62) else -1)
        stated = _PROBABILITY.search(text)
        weights.append(_number(node, node_id, "token_prob") or (_float(stated[1]) if stated else 0.0))
    if not any(weights):
        weights = [1 / len(weights)] * len(weights)  # the file has none
    positions = [node["ctx_idx"] for node in nodes.targets.values()]
    ids_and_positions = torch.tensor([ids, positions], dtype=torch.int64)
    return Targets(labels, ids_and_positions[0], torch.tensor(weights, dtype=torch.float64), ids_and_positions[1])


def _float(text: str) -> float:
    """Number of a text; 0 for none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _provenance(metadata: dict[str, Any], parameters: dict[str, Any], nodes: _Nodes) -> dict[str, Any]:
    """Provenance that the file states, and its pins and groups, as identifiers."""
    scan = _field(metadata, "metadata", "scan", str, "")
    sets = _field(metadata, "metadata", "transcoder_list", list, [])
    info = {"info": _field(metadata, "metadata", "info", dict, {})}
    details = {"feature_details": _field(metadata, "metadata", "feature_details", dict, {})}
    known = _identifiers(nodes)
    pinned = _strings(parameters, "pinnedIds")
    groups = []
    for i, group in enumerate(_list(parameters, "supernodes")):
        if not isinstance(group, list) or not all(isinstance(text, str) for text in group) or not group:
            raise TypeError(f"qParams.supernodes[{i}] must be a name and node ids, got {_short(group)}")
        groups.append([group[0], *(known[node_id] for node_id in group[1:] if node_id in known)])
    page = {
        "slug": _field(metadata, "metadata", "slug", str, ""),
        "pinned": [known[node_id] for node_id in pinned if node_id in known],
        "groups": groups,
        **{name: value for name, value in (info | details).items() if value},
    }
    unknown = sorted(set(range(nodes.positions)) - nodes.token_ids.keys())
    return {
        "law": "unknown",
        **({"scan": sets or scan} if sets or scan else {}),
        **({"unknown_tokens": unknown} if unknown else {}),
        PAGE: page,
    }


def _list(parameters: dict[str, Any], name: str) -> list[Any]:
    """List of the parameters, which an address holds as a text."""
    value = _field(parameters, "qParams", name, (list, str), [])
    if isinstance(value, str):
        value = json.loads(value) if value else []
    if not isinstance(value, list):
        raise TypeError(f"qParams.{name} must be a list, got {_short(value)}")
    return value


def _strings(parameters: dict[str, Any], name: str) -> list[str]:
    value = _field(parameters, "qParams", name, (list, str), [])
    texts = value.split(",") if isinstance(value, str) else value
    return [text for text in texts if isinstance(text, str)]


def _identifiers(nodes: _Nodes) -> dict[str, str]:
    """Identifier of each node by its node_id."""
    known = {node_id: f"{layer}/{position}/{feature}" for node_id, (layer, position, feature) in nodes.features.items()}
    known |= {node_id: f"error/{layer}/{position}" for node_id, (layer, position) in nodes.errors.items()}
    known |= {node_id: f"token/{position}" for node_id, position in nodes.tokens.items()}
    return known | {node_id: f"target/{i}" for i, node_id in enumerate(nodes.targets)}


def _edited_labels(parameters: dict[str, Any]) -> dict[tuple[int, int], str]:
    """Labels that somebody typed on a page: by the feature's number, or by layer_number_position."""
    labels = {}
    for i, entry in enumerate(_list(parameters, "clerps")):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            raise TypeError(f"qParams.clerps[{i}] must be a feature and its label, got {_short(entry)}")
        key, text = entry
        match = re.fullmatch(r"(?:\d{1,6}_)?(\d{1,24})(?:_\d{1,9})?", str(key), re.ASCII)
        if match and not isinstance(key, bool) and text:
            labels[unpaired(int(match[1]))] = text
    return labels
