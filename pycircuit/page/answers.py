"""Answers of the page's server: a function of path, query and body each."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card_examples import CorpusExamples, ExampleFolder, Examples
from .edit_document import empty_document, node_list
from .edits import Edits
from .effects import effects
from .exports import exported
from .feature_cards import feature_card
from .graph_folder import GraphFolder, OpenGraph
from .graph_index import GraphIndex
from .json_bytes import Download, encoded
from .node_search import search
from .page_links import document_of_file, document_of_link
from .pinned_edges import pinned_edges
from .request_values import fraction, integer, text
from .selections import selection_groups, selection_scores
from .side_by_side import compare
from .traces import Traces
from .views import MAX_NODES, first_thresholds, node_details, strongest_paths, view

if TYPE_CHECKING:
    from .served_model import ServedModel

MOST_NODES = 20_000  # in a view


class Answers:
    """Graphs, their edits and a model or None, and the answers about them."""

    def __init__(self, graphs: GraphFolder, model: ServedModel | None, examples: Path | None) -> None:
        self.graphs, self.model = graphs, model
        self.documents = Edits(graphs.path, self._initial_document)
        self.examples = _examples(graphs, model, examples)
        if self.examples is not None:
            graphs.density = self.examples.density
        self._traces = None if model is None else Traces(model, graphs)

    def close(self) -> None:
        """End what runs."""
        if self._traces is not None:
            self._traces.queue.close()

    @property
    def traces(self) -> Traces:
        """Traces of the model; an error without one."""
        if self._traces is None:
            raise ValueError("page: a model must be served for this, got a folder alone; pycircuit serve MODEL")
        return self._traces

    def state(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Describe the server: version, model and graphs."""
        model = self.model
        described = None
        if model is not None:
            described = {"name": model.name, "layers": model.model.depth, "can_trace": True, "can_intervene": True}
        traces = [] if self._traces is None else self._traces.listing()
        return {
            "version": version("pycircuit"), "model": described, "graphs": self.graphs.listing(), "traces": traces
        }  # fmt: skip

    def view(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> bytes:
        """Return the view of a graph at thresholds, or at those at which it can be read."""
        first = first_thresholds(self._open(path).index)
        node = fraction(query, "node_threshold", first[0])
        edge = fraction(query, "edge_threshold", first[1])
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

    def feature(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Return the card of a feature."""
        layer, feature = (integer(path, name, 0, 0, 10**9 - 1) for name in ("layer", "feature"))
        name = query.get("graph")
        index = None if name is None else self.graphs.open(name).index
        labels = {} if name is None else self.documents.state(name)["document"]["labels"]
        served, examples = None if self._traces is None else self._traces.served, self.examples
        if served is not None and index is not None and not served.may_be_of(index.graph):
            served = None  # what this model's feature does says nothing about the graph's
            examples = None if isinstance(examples, CorpusExamples) else examples
        return feature_card(layer, feature, index, served, examples, labels)

    def estimate(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Return memory and time of a trace."""
        return self.traces.estimate(body)

    def trace(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Put a trace into the queue."""
        return self.traces.submit(body)

    def trace_after(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Put the trace of a graph's prompt under changes into the queue."""
        return self.traces.submit_after(self._name(path), self._open(path).graph, body)

    def trace_events(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Stream the progress of a trace."""
        return self.traces.stream(path["id"])

    def cancel_trace(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Cancel a trace."""
        return self.traces.cancel(path["id"])

    def edges(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Return the edges among nodes of a graph."""
        return pinned_edges(self._open(path).index, node_list("nodes", body.get("nodes")))

    def intervene(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Change features in the model, and return what that does."""
        name = self._name(path)
        document = self.documents.state(name)["document"]
        grouped = [node for group in document["groups"] for node in group["nodes"]]
        return effects(self.traces.served, self._open(path).index, body, [*document["pins"], *grouped])

    def scores(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Return the scores of a selection."""
        return selection_scores(self._open(path).index, body)

    def group(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Return groups of a selection."""
        return selection_groups(self._open(path).index, body)

    def compare(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Compare two graphs."""
        a, b = (self.graphs.open(text(query, name)).index for name in "ab")
        thresholds = fraction(query, "node_threshold", 0.8), fraction(query, "edge_threshold", 0.98)
        return compare(a, b, text(query, "align", "position"), thresholds)

    def export(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Return the graph as JSON of another page, with its groups and pins."""
        name, flavour = self._name(path), text(query, "flavour", "circuit-tracer")
        thresholds = fraction(query, "node_threshold", 0.8), fraction(query, "edge_threshold", 0.98)
        document, scan = self.documents.state(name)["document"], query.get("scan")
        content = exported(self._open(path).graph, document, flavour, self.graphs.path, name, thresholds, scan)
        return Download(content, f"{Path(name).stem}.json")

    def import_link(self, path: dict[str, Any], query: dict[str, str], body: dict[str, Any]) -> Any:
        """Make the pins, groups and labels of another page's link an edit."""
        name = self._name(path)
        state = self.documents.state(name)
        document, notes = document_of_link(self._open(path).graph, body.get("text"), state["document"])
        revision = body.get("revision", state["revision"])
        return {**self.documents.replace(name, revision, document), "notes": notes}

    def _initial_document(self, name: str) -> dict[str, Any]:
        if not name.endswith(".json"):
            return empty_document()
        return document_of_file(self.graphs.open(name).graph)

    def _name(self, path: dict[str, Any]) -> str:
        return self.graphs.file(path["name"]).name

    def _open(self, path: dict[str, Any]) -> OpenGraph:
        return self.graphs.open(path["name"])


def _examples(graphs: GraphFolder, model: ServedModel | None, folder: Path | None) -> Examples | None:
    """Return the examples of the folder that was named, or beside the graphs, or of the demo model's facts."""
    if folder is not None:
        examples = ExampleFolder.of(folder)
        if examples is None:
            raise ValueError(f"serve: examples must be a folder of pc.write_examples with one set, got {folder}")
        return examples
    beside = ExampleFolder.of(graphs.path)
    if beside is None and model is not None and model.is_demo:
        return CorpusExamples.of_demo(model.model)
    return beside
