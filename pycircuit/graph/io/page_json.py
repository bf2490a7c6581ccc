"""The JSON that circuit-tracer's page reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from pycircuit.files.atomic import writable, write_text
from pycircuit.files.locks import locked
from pycircuit.graph.prune import Pruned, thresholds
from pycircuit.graph.supernodes import supernodes

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

_SLUG = re.compile(r"[^/\\\x00-\x1f]+")
_OVERVIEW = "graph-metadata.json"
_PINNED = 200  # circuit-tracer's page draws no more in its subgraph


def to_json(
    graph: Graph, path: str | os.PathLike[str], slug: str | None, node_threshold: float, edge_threshold: float,
    scan: str | None,
) -> str:  # fmt: skip
    """Write a graph as JSON for circuit-tracer's page; return the query of its address."""
    path = writable("Graph.to_json", path)
    slug = path.stem if slug is None else slug
    if not isinstance(slug, str) or not _SLUG.fullmatch(slug):
        raise ValueError(f"Graph.to_json: slug must be a name without slashes or control characters, got {slug!r}")
    scan, transcoder_list = _transcoders(graph, scan)
    node_threshold, edge_threshold = thresholds("Graph.to_json", node_threshold, edge_threshold)
    pruned = graph.prune(node_threshold, edge_threshold)
    metadata = {
        "slug": slug, "scan": scan, "transcoder_list": transcoder_list, "prompt_tokens": list(graph.tokens.text),
        "prompt": graph.prompt, "node_threshold": node_threshold, "schema_version": 1,
        "pruning_settings": {"node_threshold": node_threshold, "edge_threshold": edge_threshold},
    }  # fmt: skip
    nodes = _nodes(pruned)
    ids = {node: entry["node_id"] for node, entry in nodes.items()}
    groups = _groups(pruned, ids)
    pinned = [node_id for _, *members in groups for node_id in members]
    parameters = {"pinnedIds": pinned, "supernodes": groups, "linkType": "both", "clickedId": "", "sg_pos": ""}
    content = {"metadata": metadata, "qParams": parameters, "nodes": list(nodes.values()), "links": _links(pruned, ids)}
    write_text("Graph.to_json", path, json.dumps(content, allow_nan=False))
    _add_to_overview(path.with_name(_OVERVIEW), metadata)
    _warn_of_one_layer(pruned)
    return _query(slug, pinned, groups)


def _transcoders(graph: Graph, scan: str | None) -> tuple[str, list[str]]:
    """(name of the transcoder set, list of several sets), as circuit-tracer's page reads them."""
    names = graph.provenance.get("scan", "local") if scan is None else scan
    if isinstance(names, list) and scan is None:
        return f"custom-{hashlib.sha256('-'.join(names).encode()).hexdigest()[:16]}", names
    if not isinstance(names, str):
        raise TypeError(f"Graph.to_json: scan must be a string, got {type(names).__name__}")
    return names, []


def _groups(pruned: Pruned, ids: dict[int, str]) -> list[list[str]]:
    """Name and node ids of each supernode, the most influential first, as many as can be pinned.

    Names are made unique, since pages merge groups of one name.
    """
    groups: list[list[str]] = []
    names: set[str] = set()
    count = 0
    for name, members in supernodes(pruned):
        if count + len(members) > _PINNED:
            continue
        count += len(members)
        unique, number = name, 2
        while unique in names:
            unique, number = f"{name} ({number})", number + 1
        names.add(unique)
        groups.append([unique, *(ids[node] for node in members)])
    return groups


def _query(slug: str, pinned: list[str], groups: list[list[str]]) -> str:
    """Query of the page's address. circuit-tracer's page reads supernodes only from there, and decodes them twice."""
    values = {"slug": slug} | ({"pinnedIds": ",".join(pinned), "supernodes": json.dumps(groups)} if groups else {})
    return "&".join(f"{name}={quote(quote(value, safe=''), safe='')}" for name, value in values.items())


def _warn_of_one_layer(pruned: Pruned) -> None:
    graph, nodes = pruned.original, pruned.node_mask.nonzero()[:, 0]
    layers = graph.features[nodes[nodes < graph.first_error], 0].tolist()
    errors = nodes[(nodes >= graph.first_error) & (nodes < graph.first_token)] - graph.first_error
    if max([*layers, *(errors // graph.positions).tolist()], default=0) < 1:
        warnings.warn(
            "Graph.to_json: features or errors must be above layer 0 for Neuronpedia's page, which opens no other "
            f"file, got none of {graph.layers} layers; circuit-tracer's page opens it",
            stacklevel=4,
        )


def _nodes(pruned: Pruned) -> dict[int, dict[str, Any]]:
    nodes = pruned.node_mask.nonzero()[:, 0].tolist()
    shares = pruned.cumulative().tolist()
    return {node: _node(pruned.original, node, share) for node, share in zip(nodes, shares, strict=True)}


def _node(graph: Graph, node: int, cumulative: float) -> dict[str, Any]:
    description = graph.describe(node)
    position = description["position"]
    fields = {"feature": _feature, "error": _error, "token": _token}.get(description["kind"])
    entry = {
        "ctx_idx": position, "run_idx": 0, "reverse_ctx_idx": 0, "token_prob": 0.0, "is_target_logit": False,
        "clerp": "", "influence": cumulative, "activation": None,
    }  # fmt: skip
    return entry | (fields(description) if fields else _target(graph, node - graph.first_target, description))


def feature_id(layer: int, feature: int) -> int:
    """Pair layer and feature to one number, which also names the feature's file for the page."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _feature(description: dict[str, Any]) -> dict[str, Any]:
    layer, feature, position = description["layer"], description["feature"], description["position"]
    return {
        "node_id": f"{layer}_{feature}_{position}",
        "feature": feature_id(layer, feature),
        "layer": str(layer),
        "feature_type": "cross layer transcoder",
        "jsNodeId": f"{layer}_{feature}-0",
        "activation": description["value"],
        "clerp": _clerp(description),
    }


def _clerp(description: dict[str, Any]) -> str:
    """Label of a feature for the page, which has no field that says that it is automatic."""
    label: str = description.get("label", "").replace("(p=", "(p =")  # pages split at the first `(p=`
    return f"{label} (automatic)" if description.get("automatic") else label


def _error(description: dict[str, Any]) -> dict[str, Any]:
    layer, position = description["layer"], description["position"]
    return {
        # Three numbers, as pages parse ids from an address, and no feature has index -1.
        "node_id": f"{layer}_-1_{position}",
        "feature": -1,
        "layer": str(layer),
        "feature_type": "mlp reconstruction error",
        "jsNodeId": f"{layer}_-1-{position}",
    }


def _token(description: dict[str, Any]) -> dict[str, Any]:
    token, position = description["token"], description["position"]
    return {
        "node_id": f"E_{token}_{position}",
        "feature": position,
        "layer": "E",
        "feature_type": "embedding",
        "jsNodeId": f"E_{token}-{position}",
    }


def _target(graph: Graph, target: int, description: dict[str, Any]) -> dict[str, Any]:
    layer, position, token = graph.layers + 1, description["position"], _token_id(graph, target)
    label = description["label"].replace("(p=", "(p =")  # the page takes the probability from the first `(p=`
    return {
        "node_id": f"{layer}_{token}_{position}",
        "feature": token,
        "layer": str(layer),
        "feature_type": "logit",
        "jsNodeId": f"L_{token}-{position}",
        "token_prob": description["weight"],
        "is_target_logit": target == 0,
        "clerp": f'Output "{label}" (p={description["weight"]:.3f})',
        "influence": None,
    }


def _token_id(graph: Graph, target: int) -> int:
    """Token of the target, or a number past the vocabulary if it is no token or an earlier target has the same one."""
    ids, positions = graph.targets.ids, graph.targets.positions
    earlier = (ids[:target] == ids[target]) & (positions[:target] == positions[target])
    if ids[target] >= 0 and not earlier.any():
        return int(ids[target])
    return max(graph.vocab_size, int(ids.max()) + 1) + target


def _links(pruned: Pruned, ids: dict[int, str]) -> list[dict[str, Any]]:
    rows, entries = pruned.original.rows, np.flatnonzero(pruned.edge_mask.numpy())
    row = np.searchsorted(rows.row_ptr.numpy(), entries, side="right") - 1
    source, weight = rows.column.numpy()[entries].tolist(), rows.weight.numpy()[entries].tolist()
    target = pruned.original.row_node.numpy()[row].tolist()
    ends = zip(source, target, weight, strict=True)
    return [{"source": ids[s], "target": ids[t], "weight": w} for s, t, w in ends]


def _add_to_overview(path: Path, metadata: dict[str, Any]) -> None:
    """Replace or add the graph's entry in the overview."""
    with locked(path.parent):
        graphs = [entry for entry in _entries(path) if entry.get("slug") != metadata["slug"]]
        write_text("Graph.to_json", path, json.dumps({"graphs": [*graphs, metadata]}, allow_nan=False, indent=2))


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        graphs = json.loads(path.read_bytes())["graphs"]
        if all(isinstance(entry, dict) for entry in graphs):
            return list(graphs)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f'Graph.to_json: {path} must be {{"graphs": [...]}}, got something else; move it away')
