"""Files of graphs by their endings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

ENDINGS = (".safetensors", ".json", ".pt")


def open_graph(graph_type: type[Graph], path: str | os.PathLike[str], tokenizer: Any = None) -> Graph:
    """Read a graph file by its ending."""
    ending = Path(path).suffix.lower()
    if ending == ".safetensors":
        return graph_type.load(path)
    if ending == ".json":
        return graph_type.from_json(path)
    if ending == ".pt":
        return graph_type.from_circuit_tracer(path, tokenizer)
    raise ValueError(f"Graph.open: path must end in {', '.join(ENDINGS)}, got {path}")
