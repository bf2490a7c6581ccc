"""Answers of the page's server: a function of path, query and body each."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .edits import Edits
from .graph_folder import GraphFolder, OpenGraph
from .graph_index import GraphIndex
from .json_bytes import encoded
from .node_search import search
from .request_values import fraction, integer, text
from .views import MAX_NODES, node_details, strongest_paths, view

if TYPE_CHECKING:
    from .served_model import ServedModel

MOST_NODES = 20_000  # in a view


class Answers:
    """Graphs, their edits and a model or None, and the answers about them."""

    def __init__(self, graphs: GraphFolder, model: ServedModel | None, examples: Path | None) -> None:
        self.graphs, self.model = graphs, model
        self.documents = Edits(graphs.path)

    def close(self) -> None:
        """End what runs."""

    def state(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Describe the server: version, model and graphs."""
        model = self.model
        described = None
        if model is not None:
            described = {"name": model.name, "layers": model.model.depth, "can_trace": True, "can_intervene": True}
        return {"version": version("pycircuit"), "model": described, "graphs": self.graphs.listing()}

    def view(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> bytes:
        """Return the view of a graph at thresholds."""
        node = fraction(query, "node_threshold", 0.8)
        edge = fraction(query, "edge_threshold", 0.98)
        most = integer(query, "max_nodes", MAX_NODES, 1, MOST_NODES)

        def make(index: GraphIndex) -> bytes:
            return encoded({"name": path["name"], **view(index.graph, node, edge, most, index=index)})

        return self._open(path).view((node, edge, most), make)

    def node(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Return a node with its inputs and outputs."""
        return node_details(self._open(path).index, text(query, "id"), integer(query, "limit", 50, 1, 1000))

    def paths(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Return the strongest paths between two nodes."""
        k = integer(query, "k", 5, 1, 50)
        return strongest_paths(self._open(path).index, text(query, "source"), text(query, "target"), k)

    def search(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Return the nodes that a text names."""
        labels = self.documents.state(path["name"])["document"]["labels"]
        return search(self._open(path).index, text(query, "q"), labels)

    def edits(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Return the edits of a graph."""
        return self.documents.state(self.graphs.file(path["name"]).name)

    def replace_edits(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Keep a new document of edits."""
        return self.documents.replace(self._name(path), body.get("revision"), body.get("document"))

    def undo(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Take the last edit back."""
        return self.documents.undo(self._name(path), body.get("revision"))

    def redo(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Make the edit again that was taken back."""
        return self.documents.redo(self._name(path), body.get("revision"))

    def _name(self, path: dict[str, Any]) -> str:
        return self.graphs.file(path["name"]).name

    def _open(self, path: dict[str, Any]) -> OpenGraph:
        return self.graphs.open(path["name"])
