"""A graph as JSON of another page, with the groups, pins and labels of its edits."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pycircuit.graph import Graph
from pycircuit.graph.io.page_json import PAGE
from pycircuit.graph.io.page_metadata import FLAVOURS

from .node_ids import present_nodes

OP = "page"


def exported(
    graph: Graph, document: Mapping[str, Any], flavour: str, folder: Path, name: str, thresholds: tuple[float, float],
    scan: str | None,
) -> bytes:  # fmt: skip
    """Return the file of a flavour. folder: where a draft of it is written, and removed; scan: as of Graph.to_json."""
    if flavour not in FLAVOURS:
        raise ValueError(f"{OP}: flavour must be one of {', '.join(FLAVOURS)}, got {flavour[:40]!r}")
    labels = dict(graph.labels)
    for key, text in document["labels"].items():
        layer, feature = map(int, key.split("/"))
        labels[layer, feature] = text
    provenance = {key: value for key, value in graph.provenance.items() if key != PAGE}  # its pins are edits by now
    edited = replace(graph, labels=labels, provenance=provenance)
    groups = [(group["name"], present_nodes(graph, group["nodes"])) for group in document["groups"]]
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as draft, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what the other page refuses: the export is right all the same
        path = Path(draft) / f"{Path(name).stem}.json"
        edited.to_json(
            path,
            scan=scan,
            node_threshold=thresholds[0],
            edge_threshold=thresholds[1],
            flavour="neuronpedia" if flavour == "neuronpedia" else "circuit-tracer",
            groups=[group for group in groups if group[1]],
            pinned=present_nodes(graph, document["pins"]),
        )
        return path.read_bytes()
