"""The fields that the published schema of graph JSON (1.0.0) requires, with their types, and what its page computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

SECTIONS = ("metadata", "qParams", "nodes", "links")
NUMBER = (int, float)
# place -> {field: (types, required)}
FIELDS: dict[str, dict[str, tuple[tuple[type, ...], bool]]] = {
    "file": {name: ((dict if name in ("metadata", "qParams") else list,), True) for name in SECTIONS},
    "metadata": {
        "slug": ((str,), True), "scan": ((str,), True), "prompt_tokens": ((list,), True), "prompt": ((str,), True),
        "feature_details": ((dict,), False), "node_threshold": (NUMBER, False), "info": ((dict,), False),
        "generation_settings": ((dict,), False), "pruning_settings": ((dict,), False),
    },
    "info": {"description": ((str,), False), "generator": ((dict,), False), "create_time_ms": (NUMBER, False)},
    "generator": {"name": ((str,), False), "version": ((str,), False), "url": ((str,), False)},
    "feature_details": {"feature_json_base_url": ((str,), False), "neuronpedia_source_set": ((str,), False)},
    "generation_settings": {
        "max_n_logits": ((int,), False), "desired_logit_prob": (NUMBER, False), "batch_size": ((int,), False),
        "max_feature_nodes": ((int,), False),
    },
    "pruning_settings": {"node_threshold": (NUMBER, False), "edge_threshold": (NUMBER, False)},
    "qParams": {
        "pinnedIds": ((list,), False), "supernodes": ((list,), False), "linkType": ((str,), False),
        "clickedId": ((str,), False), "sg_pos": ((str,), False),
    },
    "node": {
        "node_id": ((str,), True), "feature": ((int, type(None)), True), "layer": ((str, int), True),
        "ctx_idx": ((int,), True), "feature_type": ((str,), True), "jsNodeId": ((str,), True), "clerp": ((str,), True),
        "influence": ((*NUMBER, type(None)), False), "activation": ((*NUMBER, type(None)), False),
    },
    "link": {"source": ((str,), True), "target": ((str,), True), "weight": (NUMBER, True)},
}  # fmt: skip


def violations(content: Any) -> list[str]:
    """Return what breaks the schema: a field that is missing, or of another type."""
    metadata, info = content["metadata"], content["metadata"].get("info", {})
    places = [("file", content), ("metadata", metadata), ("qParams", content["qParams"]), ("info", info)]
    places += [("generator", info.get("generator", {}))]
    places += [(n, metadata.get(n, {})) for n in ("feature_details", "generation_settings", "pruning_settings")]
    places += [("node", node) for node in content["nodes"]] + [("link", link) for link in content["links"]]
    return [
        f"{place}.{name}: {owner.get(name)!r}"
        for place, owner in places
        for name, (types, required) in FIELDS[place].items()
        if (required or name in owner) and (type(owner.get(name)) not in types)
    ]


def drawn(content: dict[str, Any]) -> dict[str, tuple[int, int] | float | None]:
    """Compute what Neuronpedia's page does when it opens a file, in JavaScript's numbers, or raise as it does.

    (layer, feature) of a feature, from its number; the probability of a logit; None of other nodes.
    """
    layers = [float(n["layer"]) for n in content["nodes"] if n["feature_type"] != "logit" and n["layer"] != "E"]
    if not max(layers, default=0.0):
        raise ValueError("No layer found")
    result: dict[str, tuple[int, int] | float | None] = {}
    for node in content["nodes"]:
        result[node["node_id"]] = None
        if node["feature_type"] == "logit":
            result[node["node_id"]] = float(node["clerp"].split("(p=")[1].split(")")[0])
        elif node["feature_type"] == "cross layer transcoder":
            number = float(node["feature"])
            diagonal = math.floor((math.sqrt(8 * number + 1) - 1) / 2)
            feature = number - (diagonal * diagonal + diagonal) / 2
            result[node["node_id"]] = (int(diagonal - feature), int(feature))
    return result


def scores(content: dict[str, Any]) -> tuple[float, float]:
    """Compute replacement and completeness from a file alone, by a dense matrix, as Neuronpedia's page does."""
    number = {node["node_id"]: i for i, node in enumerate(content["nodes"])}
    kinds = np.array([node["feature_type"] for node in content["nodes"]])
    shares = np.zeros((len(number), len(number)))
    for link in content["links"]:
        shares[number[link["target"]], number[link["source"]]] = abs(link["weight"])
    shares /= np.maximum(shares.sum(1, keepdims=True), 1e-10)
    weights = np.array([node["token_prob"] for node in content["nodes"]])
    influence = np.linalg.solve(np.eye(len(number)) - shares.T, weights) - weights
    tokens, errors = (float(influence[kinds == k].sum()) for k in ("embedding", "mlp reconstruction error"))
    explained = 1 - shares[:, kinds == "mlp reconstruction error"].sum(1)
    reaching = influence + weights
    return tokens / (tokens + errors), float(explained @ reaching / reaching.sum())
