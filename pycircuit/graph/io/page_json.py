"""The JSON that circuit-tracer's page and Neuronpedia's read, in the flavour of either."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import numpy as np
import torch

from pycircuit.files.atomic import writable, write_text
from pycircuit.files.locks import locked
from pycircuit.graph.csr import index_below
from pycircuit.graph.identifiers import node_of
from pycircuit.graph.prune import Pruned
from pycircuit.graph.supernodes import supernodes

from .page_metadata import OP, Groups, PageOptions, page_metadata

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

AUTOMATIC = " (automatic)"  # ends a label that no person gave
PAGE = "page"  # of the provenance of a graph from a page's JSON: its slug, pins and groups

_OVERVIEW = "graph-metadata.json"
_PINNED = 200  # circuit-tracer's page draws no more in its subgraph
_UPLOAD = 100 << 20  # bytes that Neuronpedia takes


def to_json(graph: Graph, path: str | os.PathLike[str], options: PageOptions) -> str:
    """Write a graph as JSON for a page; return the query of its address."""
    path = writable(OP, path)
    metadata = page_metadata(graph, path, options)
    neuronpedia = options.flavour == "neuronpedia"
    node_threshold, edge_threshold = metadata["pruning_settings"].values()
    pruned = graph.prune(node_threshold, edge_threshold)
    members = _named_groups(graph, pruned, options.groups)
    wanted = _present(graph, _of_file(graph, "pinned") or []) if options.pinned is None else options.pinned
    pins = [index_below(OP, "pinned", node, graph.nodes) for node in wanted]
    pruned = _with_nodes(pruned, [*pins, *(node for _, nodes in members for node in nodes)])
    nodes = _nodes(pruned)
    if neuronpedia:
        _reach_layer_1(graph, nodes, metadata)
    ids = {node: entry["node_id"] for node, entry in nodes.items() if node >= 0}
    groups = [[name, *(ids[node] for node in group)] for name, group in members]
    pinned = list(dict.fromkeys([*(node_id for _, *group in groups for node_id in group), *(ids[n] for n in pins)]))
    parameters = {"pinnedIds": pinned, "supernodes": groups, "linkType": "both", "clickedId": "", "sg_pos": ""}
    content = {"metadata": metadata, "qParams": parameters, "nodes": list(nodes.values()), "links": _links(pruned, ids)}
    text = json.dumps(content, allow_nan=False)
    write_text(OP, path, text)
    if neuronpedia:
        _warn_of_size(len(text))
    else:
        _add_to_overview(path.with_name(_OVERVIEW), metadata)
        _warn_of_one_layer(pruned)
    return _query(metadata["slug"], pinned, groups, neuronpedia)


def _named_groups(graph: Graph, pruned: Pruned, groups: Groups | None) -> list[tuple[str, tuple[int, ...]]]:
    """Groups with names of their own, since pages merge groups of one name: those asked for, of the file, or ours."""
    if groups is not None:
        wanted = [(str(name), _members(graph, nodes)) for name, nodes in groups]
    elif (stored := _of_file(graph, "groups")) is not None:
        lists = [group for group in stored if isinstance(group, list) and group]
        wanted = [(str(name), tuple(_present(graph, ids))) for name, *ids in lists]
    else:
        wanted = _that_fit([(name, nodes) for name, nodes in supernodes(pruned)])
    names: set[str] = set()
    result = []
    for name, nodes in wanted:
        unique, number = name, 2
        while unique in names:
            unique, number = f"{name} ({number})", number + 1
        names.add(unique)
        if nodes:
            result.append((unique, nodes))
    return result


def _members(graph: Graph, nodes: Iterable[int]) -> tuple[int, ...]:
    return tuple(index_below(OP, "groups", node, graph.nodes) for node in nodes)


def _that_fit(groups: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    """Groups, the most influential first, as many as can be pinned."""
    result, count = [], 0
    for name, nodes in groups:
        if count + len(nodes) <= _PINNED:
            count += len(nodes)
            result.append((name, nodes))
    return result


def _of_file(graph: Graph, name: str) -> list[Any] | None:
    """Groups or pins of the page's file that the graph was read from, None without one."""
    page = graph.provenance.get(PAGE)
    stored = page.get(name) if isinstance(page, dict) else None
    return stored if isinstance(stored, list) else None


def _present(graph: Graph, identifiers: Iterable[Any]) -> Iterable[int]:
    """Nodes of the identifiers that this graph still has."""
    for text in identifiers:
        try:
            yield node_of(graph, str(text))
        except ValueError:
            continue


def _with_nodes(pruned: Pruned, nodes: list[int]) -> Pruned:
    """Pruning with these nodes too, and with their edges from and to all that remains."""
    added = torch.zeros_like(pruned.node_mask)
    added[nodes] = True
    added &= ~pruned.node_mask
    if not added.any():
        return pruned
    rows, node_mask = pruned.original.rows, pruned.node_mask | added
    source, target = rows.column.long(), pruned.original.row_node[torch.from_numpy(rows.row_of_entry())]
    edges = node_mask[source] & node_mask[target] & (added[source] | added[target])
    return replace(pruned, node_mask=node_mask, edge_mask=pruned.edge_mask | edges)


def _reach_layer_1(graph: Graph, nodes: dict[int, dict[str, Any]], metadata: dict[str, Any]) -> None:
    """Add an error of layer 1 without links if there is nothing above layer 0: Neuronpedia's page opens no other file.

    Its influence is beyond the page's slider, so the page does not draw it, and `info` says what it is.
    """
    if _highest_layer(nodes.values()) >= 1:
        return
    placeholder = _error({"layer": 1, "position": 0})
    nodes[-1] = _BLANK | placeholder | {"ctx_idx": 0, "influence": 1.0}
    metadata["info"]["description"] = (
        f"The node {placeholder['node_id']} has no links and stands for nothing: pages need one above layer 0."
    )


def _highest_layer(nodes: Iterable[dict[str, Any]]) -> int:
    return max((int(n["layer"]) for n in nodes if n["feature_type"] not in ("embedding", "logit")), default=-1)


def _warn_of_size(size: int) -> None:
    if size > _UPLOAD:
        warnings.warn(
            f"{OP}: the file must have at most {_UPLOAD >> 20} MB for Neuronpedia, got {size >> 20}; lower the "
            "thresholds",
            stacklevel=4,
        )


def _query(slug: str, pinned: list[str], groups: list[list[str]], neuronpedia: bool) -> str:
    """Query of the page's address. circuit-tracer's page reads supernodes only from there, and decodes them twice."""
    values = {"slug": slug}
    if pinned:
        values["pinnedIds"] = ",".join(pinned)
    if groups:
        values["supernodes"] = json.dumps(groups)
    if neuronpedia:
        return urlencode(values)
    return "&".join(f"{name}={quote(quote(value, safe=''), safe='')}" for name, value in values.items())


def _warn_of_one_layer(pruned: Pruned) -> None:
    graph, nodes = pruned.original, pruned.node_mask.nonzero()[:, 0]
    layers = graph.features[nodes[nodes < graph.first_error], 0].tolist()
    errors = nodes[(nodes >= graph.first_error) & (nodes < graph.first_token)] - graph.first_error
    if max([*layers, *(errors // graph.positions).tolist()], default=0) < 1:
        warnings.warn(
            f"{OP}: features or errors must be above layer 0 for Neuronpedia's page, which opens no other "
            f"file, got none of {graph.layers} layers; circuit-tracer's page opens it, and flavour='neuronpedia' "
            "writes a file that Neuronpedia's opens",
            stacklevel=4,
        )


def _nodes(pruned: Pruned) -> dict[int, dict[str, Any]]:
    nodes = pruned.node_mask.nonzero()[:, 0].tolist()
    shares = pruned.cumulative().tolist()
    return {node: _node(pruned.original, node, share) for node, share in zip(nodes, shares, strict=True)}


_BLANK: dict[str, Any] = {
    "ctx_idx": 0, "run_idx": 0, "reverse_ctx_idx": 0, "token_prob": 0.0, "is_target_logit": False, "clerp": "",
    "influence": None, "activation": None,
}  # fmt: skip


def _node(graph: Graph, node: int, cumulative: float) -> dict[str, Any]:
    description = graph.describe(node)
    position = description["position"]
    fields = {"feature": _feature, "error": _error, "token": _token}.get(description["kind"])
    entry = _BLANK | {"ctx_idx": position, "influence": cumulative}
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
    return label + AUTOMATIC if description.get("automatic") else label


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
        write_text(OP, path, json.dumps({"graphs": [*graphs, metadata]}, allow_nan=False, indent=2))


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        graphs = json.loads(path.read_bytes())["graphs"]
        if all(isinstance(entry, dict) for entry in graphs):
            return list(graphs)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f'{OP}: {path} must be {{"graphs": [...]}}, got something else; move it away')
