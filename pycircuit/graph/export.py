"""The JSON that circuit-tracer's page reads."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pycircuit.files.atomic import writable, write_text
from pycircuit.files.locks import locked

from .prune import Pruned, thresholds
from .supernodes import supernodes

if TYPE_CHECKING:
    from .graph import Graph

_SLUG = re.compile(r"[^/\\\x00-\x1f]+")
_OVERVIEW = "graph-metadata.json"


def to_json(
    graph: Graph, path: str | os.PathLike[str], slug: str | None, node_threshold: float, edge_threshold: float,
    scan: str | None,
) -> None:  # fmt: skip
    path = writable("Graph.to_json", path)
    slug = path.stem if slug is None else slug
    if not isinstance(slug, str) or not _SLUG.fullmatch(slug):
        raise ValueError(f"Graph.to_json: slug must be a name without slashes or control characters, got {slug!r}")
    scan = str(graph.provenance.get("scan", "local")) if scan is None else scan
    if not isinstance(scan, str):
        raise TypeError(f"Graph.to_json: scan must be a string, got {type(scan).__name__}")
    node_threshold, edge_threshold = thresholds("Graph.to_json", node_threshold, edge_threshold)
    pruned = graph.prune(node_threshold, edge_threshold)
    metadata = {
        "slug": slug, "scan": scan, "transcoder_list": [], "prompt_tokens": list(graph.tokens.text),
        "prompt": graph.prompt, "node_threshold": node_threshold, "schema_version": 1,
        "pruning_settings": {"node_threshold": node_threshold, "edge_threshold": edge_threshold},
    }  # fmt: skip
    nodes = _nodes(pruned)
    groups = [[name, *(nodes[node]["node_id"] for node in group)] for name, group in supernodes(pruned)]
    parameters = {"pinnedIds": [], "supernodes": groups, "linkType": "both", "clickedId": "", "sg_pos": ""}
    links = _links(pruned, {node: entry["node_id"] for node, entry in nodes.items()})
    whole = {"metadata": metadata, "qParams": parameters, "nodes": list(nodes.values()), "links": links}
    write_text("Graph.to_json", path, json.dumps(whole, allow_nan=False))
    _enter(path.with_name(_OVERVIEW), metadata)


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
        # Not the peers' 0_{layer}_{position}: feature `layer` of layer 0 has that name. The page only compares ids.
        "node_id": f"error_{layer}_{position}",
        "feature": -1,
        "layer": str(layer),
        "feature_type": "mlp reconstruction error",
        "jsNodeId": f"{layer}_{position}-0",
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
