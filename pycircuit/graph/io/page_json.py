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
    _enter(path.with_name(_OVERVIEW), metadata)
    _warn_of_one_layer(pruned)
    return _query(slug, pinned, groups)


def _transcoders(graph: Graph, scan: str | None) -> tuple[str, list[str]]:
    """(the set of transcoders, the list of them where there are several), as circuit-tracer's page takes them."""
    names = graph.provenance.get("scan", "local") if scan is None else scan
    if isinstance(names, list) and scan is None:
        return f"custom-{hashlib.sha256('-'.join(names).encode()).hexdigest()[:16]}", names
    if not isinstance(names, str):
        raise TypeError(f"Graph.to_json: scan must be a string, got {type(names).__name__}")
    return names, []


def _groups(pruned: Pruned, ids: dict[int, str]) -> list[list[str]]:
    """Name and node ids of each supernode, the most influential first, as many as can be pinned.

    No name stands twice: pages take groups of one name for the same group.
    """
    groups, names, count = [], set[str](), 0
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
    """What follows `index.html?`. circuit-tracer's page takes supernodes from there alone, and decodes them twice."""
    values = {"slug": slug} | ({"pinnedIds": ",".join(pinned), "supernodes": json.dumps(groups)} if groups else {})
    return "&".join(f"{name}={quote(quote(value, safe=''), safe='')}" for name, value in values.items())


def _warn_of_one_layer(pruned: Pruned) -> None:
    graph, shown = pruned.whole, pruned.node_mask.nonzero()[:, 0]
    layers = graph.features[shown[shown < graph.first_error], 0].tolist()
    errors = shown[(shown >= graph.first_error) & (shown < graph.first_token)] - graph.first_error
    if max([*layers, *(errors // graph.positions).tolist()], default=0) < 1:
        warnings.warn(
            "Graph.to_json: features or errors must be above layer 0 for Neuronpedia's page, which opens no other "
            f"file, got none of {graph.layers} layers; circuit-tracer's page opens it",
            stacklevel=4,
        )


def _nodes(pruned: Pruned) -> dict[int, dict[str, Any]]:
    kept = pruned.node_mask.nonzero()[:, 0].tolist()
    return {node: _node(pruned.whole, node, c) for node, c in zip(kept, pruned.cumulative().tolist(), strict=True)}


def _node(graph: Graph, node: int, cumulative: float) -> dict[str, Any]:
    about = graph.describe(node)
    position = about["position"]
    names = {"feature": _feature, "error": _error, "token": _token}.get(about["kind"])
    entry = {
        "ctx_idx": position, "run_idx": 0, "reverse_ctx_idx": 0, "token_prob": 0.0, "is_target_logit": False,
        "clerp": "", "influence": cumulative, "activation": None,
    }  # fmt: skip
    return entry | (names(about) if names else _target(graph, node - graph.first_target, about))


def feature_id(layer: int, feature: int) -> int:
    """One number for the two; the page also looks for the feature's file by it."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _feature(about: dict[str, Any]) -> dict[str, Any]:
    layer, feature, position = about["layer"], about["feature"], about["position"]
    return {
        "node_id": f"{layer}_{feature}_{position}",
        "feature": feature_id(layer, feature),
        "layer": str(layer),
        "feature_type": "cross layer transcoder",
        "jsNodeId": f"{layer}_{feature}-0",
        "activation": about["value"],
        "clerp": about.get("label", ""),
    }


def _error(about: dict[str, Any]) -> dict[str, Any]:
    layer, position = about["layer"], about["position"]
    return {
        # Three numbers, as pages read ids from an address, and none of a feature's.
        "node_id": f"{layer}_-1_{position}",
        "feature": -1,
        "layer": str(layer),
        "feature_type": "mlp reconstruction error",
        "jsNodeId": f"{layer}_-1-{position}",
    }


def _token(about: dict[str, Any]) -> dict[str, Any]:
    token, position = about["token"], about["position"]
    return {
        "node_id": f"E_{token}_{position}",
        "feature": position,
        "layer": "E",
        "feature_type": "embedding",
        "jsNodeId": f"E_{token}-{position}",
    }


def _target(graph: Graph, target: int, about: dict[str, Any]) -> dict[str, Any]:
    layer, position, token = graph.layers + 1, about["position"], _token_id(graph, target)
    label = about["label"].replace("(p=", "(p =")  # the page takes the probability from the first `(p=`
    return {
        "node_id": f"{layer}_{token}_{position}",
        "feature": token,
        "layer": str(layer),
        "feature_type": "logit",
        "jsNodeId": f"L_{token}-{position}",
        "token_prob": about["weight"],
        "is_target_logit": target == 0,
        "clerp": f'Output "{label}" (p={about["weight"]:.3f})',
        "influence": None,
    }


def _token_id(graph: Graph, target: int) -> int:
    """The target's token, or a number past the vocabulary where it is none or an earlier target has it already."""
    ids, positions = graph.targets.ids, graph.targets.positions
    earlier = (ids[:target] == ids[target]) & (positions[:target] == positions[target])
    if ids[target] >= 0 and not earlier.any():
        return int(ids[target])
    return max(graph.vocab_size, int(ids.max()) + 1) + target


def _links(pruned: Pruned, ids: dict[int, str]) -> list[dict[str, Any]]:
    rows, kept = pruned.whole.rows, np.flatnonzero(pruned.edge_mask.numpy())
    row = np.searchsorted(rows.row_ptr.numpy(), kept, side="right") - 1
    source, weight = rows.column.numpy()[kept].tolist(), rows.weight.numpy()[kept].tolist()
    target = pruned.whole.row_node.numpy()[row].tolist()
    ends = zip(source, target, weight, strict=True)
    return [{"source": ids[s], "target": ids[t], "weight": w} for s, t, w in ends]


def _enter(path: Path, metadata: dict[str, Any]) -> None:
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
