"""Files for circuit-tracer's page: nodes by circuit-tracer's code, edges, most of a file, by pycircuit's."""

from __future__ import annotations

import inspect
import json
import os
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .generations import library
from .graphs import is_plain, original, prune_graph

_MODULE = "utils.create_graph_files"
_NO_LINKS = "[]\n}"  # how circuit-tracer's text ends without edges


def create_graph_files(*args: Any, **kwargs: Any) -> None:
    """Write a graph for circuit-tracer's page: the arguments and the text of circuit-tracer's own function.

    Graphs that `prune_graph` leaves to circuit-tracer, and arguments that it rejects, go to its own function.
    """
    original_function, module = original(_MODULE, "create_graph_files"), library(_MODULE)
    bound = inspect.signature(original_function).bind(*args, **kwargs)
    bound.apply_defaults()
    graph, slug, folder, scan, node_threshold, edge_threshold = bound.arguments.values()
    if not isinstance(graph, library("graph").Graph):
        graph = module.load_graph_data(graph)
    if scan is None:
        scan = getattr(graph, list(bound.arguments)[3])  # scan or scan_name
    graph.to("cpu")
    if scan is None or (os.path.exists(folder) and not os.path.isdir(folder)) or not is_plain(graph):
        return original_function(graph, slug, folder, scan, node_threshold, edge_threshold)
    os.makedirs(folder, exist_ok=True)
    graph.to("cuda" if torch.cuda.is_available() else "cpu")
    pruned = prune_graph(graph, node_threshold, edge_threshold)
    graph.to("cpu")
    tokenizer = module.AutoTokenizer.from_pretrained(graph.cfg.tokenizer_name)
    node_mask, edge_mask, influence = (values.cpu() for values in pruned)
    nodes = module.create_nodes(graph, node_mask, tokenizer, influence.tolist())
    ids, links = _links(graph.adjacency_matrix, edge_mask, {node: entry.node_id for node, entry in nodes.items()})
    used = [n for n in nodes.values() if n.node_id in ids or n.feature_type in ("embedding", "logit")]
    model = module.build_model(graph, used, [], slug, scan, node_threshold, tokenizer)
    text = model.model_dump_json(indent=2)
    with open(os.path.join(folder, f"{slug}.json"), "w") as file:
        file.writelines([text.removesuffix(_NO_LINKS), "[\n", links, "\n  ]\n}"] if links else [text])
    module.add_graph_metadata(model.metadata.model_dump(), folder)
    return None


def _links(matrix: Tensor, edge_mask: Tensor, ids: dict[int, str]) -> tuple[set[str], str]:
    """(ids with edges, the edges among these nodes as indented JSON). ids: of nodes, ascending."""
    nodes = torch.tensor(list(ids))
    names = [json.dumps(node_id, ensure_ascii=False) for node_id in ids.values()]
    inner = edge_mask[nodes][:, nodes].numpy()
    targets, sources = np.divmod(np.flatnonzero(inner), len(nodes))
    weights = matrix[nodes[targets], nodes[sources]].tolist()
    numbers = import_module("pydantic_core").to_json(weights).decode()[1:-1].split(",")
    begins = [f'    {{\n      "source": {name},\n      "target": ' for name in names]
    middles = [f'{name},\n      "weight": ' for name in names]
    edges = zip(sources.tolist(), targets.tolist(), numbers if weights else [], strict=True)
    text = ",\n".join([f"{begins[source]}{middles[target]}{number}\n    }}" for source, target, number in edges])
    node_ids = list(ids.values())
    return {node_ids[i] for i in np.flatnonzero(inner.any(0) | inner.any(1))}, text
