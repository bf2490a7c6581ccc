"""The attribution graph: nodes and edges of one prompt, as arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pycircuit.files.atomic import writable_svg, write_text
from pycircuit.progress import Report

from .conservation import residual
from .csr import Rows
from .endpoints import Targets, Tokens
from .faithfulness import KEY, Faithfulness
from .influence import node_influence
from .invariants import validate
from .io import circuit_tracer_graph, graph_file, graphml, libraries, open_graph, page_json, page_reader, tables
from .io.page_metadata import Flavour, Groups, PageOptions
from .io.tables import Table
from .nodes import Nodes
from .paths import Path, Sign, paths
from .prune import Pruned, prune, subgraph
from .scores import Scores, scores, subgraph_scores
from .show.notebook import graph_html
from .show.picture import Picture
from .show.plot import plot
from .show.tree import lines
from .stability import Stability, stability
from .supernodes import Grouping, Supernode, supernodes


@dataclass(frozen=True, eq=False)
class Graph(Nodes):
    """Direct effects of features, errors and tokens on features and targets, for one prompt. Lives on the CPU.

    Nodes, in the order of columns: features, errors (layer-major, layers x positions), tokens, targets.

    features: [n, 3] int64 layer, position, feature.
    values: [n], activations of the features.
    rows: one CSR row for each of row_node, [rows] int64: targets and the features that were expanded.
    bias: [rows], the contribution that comes from no node.
    preactivation: [rows], the pre-activation without the encoder's bias (for a target its logit, centred as it was
        traced): the sum of edges and bias.
    product_norm: [rows], the norm of the products of encoder row and input whose sum is the pre-activation: the scale
        of rounding errors where that sum cancels; zeros where it is not known.
    dropped, dropped_mass: [rows], the sum of the entries a compressed row leaves out, and of their absolute values.
    labels: names of features by (layer, feature), where they have one.
    automatic_labels: what features raise and are active on, in a few words, by (layer, feature); names come first.
    """

    features: Tensor
    values: Tensor
    rows: Rows
    row_node: Tensor
    bias: Tensor
    preactivation: Tensor
    targets: Targets
    tokens: Tokens
    layers: int
    prompt: str = ""
    vocab_size: int = 0
    dropped: Tensor | None = None
    dropped_mass: Tensor | None = None
    product_norm: Tensor | None = None
    timings: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    labels: dict[tuple[int, int], str] = field(default_factory=dict)
    automatic_labels: dict[tuple[int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in validate(self).items():
            object.__setattr__(self, name, value)

    # The law

    @property
    def residual(self) -> Tensor:
        """Relative violation of the conservation law, row by row: [rows] float64.

        |edges + dropped + bias - preactivation| over the sum of the absolute values of all these terms, or over
        `product_norm` if that is larger: a row whose large terms cancel, among edges or inside the dot product of the
        pre-activation, is measured by its terms, not by their small sum. NaN for a graph from a file that lacks the
        pre-activations.
        """
        return residual(self)

    @property
    def certificate(self) -> float:
        """The largest relative violation of the conservation law in any row; 0 for a graph without rows."""
        return float(self.residual.max()) if self.rows.count else 0.0

    @property
    def faithfulness(self) -> Faithfulness | None:
        """Report of pc.validate: agreement of the graph with interventions; None before."""
        report = self.provenance.get(KEY)
        return None if report is None else Faithfulness.from_dict(report)

    # Views

    def dense(self) -> Tensor:
        """Edges as a matrix [nodes, nodes]: row = target, column = source; zeros for nodes without a row."""
        out = self.rows.weight.new_zeros(self.nodes, self.nodes)
        for r, node in enumerate(self.row_node.tolist()):
            column, weight = self.rows.row(r)
            out[node, column.long()] = weight
        return out

    def influence(self) -> Tensor:
        """Influence of every node on the targets, by their weights: [nodes] float64."""
        return torch.from_numpy(node_influence(self))

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruned:
        """Nodes and edges that carry these shares of the influence; `.graph` is the graph of them alone."""
        return prune(self, node_threshold, edge_threshold)

    def scores(self) -> Scores:
        """Scores (replacement, completeness): the shares of influence that run through features rather than errors."""
        return scores(self)

    def subgraph_scores(self, nodes: Iterable[int]) -> Scores:
        """Scores of a selection in the whole graph: every feature that is not among the nodes counts as an error.

        Influence starts at the targets; each selected feature hands it on in the shares of its row's |weights|; tokens,
        errors and other features end it. replacement: tokens / (tokens + errors + other features), of the influence
        there; completeness: 1 - (errors + other features) / all influence, the targets' included. With all features
        these are `scores()`; with none, replacement is the tokens' share of the targets' rows.
        """
        return subgraph_scores(self, nodes)

    def stability(
        self,
        node_thresholds: Sequence[float] = (0.7, 0.8, 0.9),
        edge_thresholds: Sequence[float] = (0.95, 0.98),
        *,
        samples: int = 8,
        seed: int = 0,
        core: float = 0.95,
        progress: bool | Report = True,
    ) -> Stability:
        """Shares of prunings that keep each node and edge, over every pair of thresholds and samples of the targets.

        A sample multiplies the targets' weights by exponential numbers drawn from `seed` (the Bayesian bootstrap); the
        first leaves them. core: least share of the prunings for nodes and edges of the core.
        """
        return stability(self, node_thresholds, edge_thresholds, samples, seed, core, progress)

    def paths(self, source: int, target: int, k: int = 1, sign: Sign | None = None) -> list[Path]:
        """The k strongest paths from node to node, strongest first: a path is nearly as strong as its weakest edge.

        sign: 1 for paths that support the target, -1 for those that oppose it, None for both.
        """
        return paths(self, source, target, k, sign)

    def supernodes(
        self,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        *,
        method: Grouping = "structure",
        fixed: Mapping[str, Sequence[int]] | None = None,
        decoders: Any = None,
    ) -> list[Supernode]:
        """Groups of two or more pruned features that act as one, and the `fixed` groups, the most influential first.

        method: "structure", features alike in what they read and write and in where they are, as many groups as the
        graph has, without a path that leaves a group and returns; "label", features of one label at one position, or
        one feature without a label. Either way labels name the groups where there are any. fixed: groups of nodes by
        name, which stay as they are. decoders: [features, width], decoder rows, which "structure" then compares too.
        """
        return supernodes(self.prune(node_threshold, edge_threshold), method, fixed, decoders)

    def tree(
        self,
        target: int = 0,
        depth: int = 5,
        branches: int = 4,
        least: float = 0.1,
        *,
        errors: bool = False,
        group: bool | Sequence[Supernode] = True,
        max_lines: int = 40,
    ) -> str:
        """Tree of a target's inputs as indented text: the strongest inputs, theirs below them, down to the tokens.

        A line has an edge's weight, its share of all that enters, and the node: its label, its identifier
        (LAYER/POSITION/FEATURE, as `pycircuit intervene` reads it) and its token. The most important nodes are
        unfolded, once each, until there are max_lines. The strongest path from a token that supports the target
        follows, and its edges are marked.

        branches: inputs shown of a node, at most; depth: levels below the target; least: weight of an input relative
        to the strongest beside it. errors: sum up the errors of every node, not of the target alone. group: features
        of one label at one position are one line; or a list of supernodes that are one line each.
        """
        text = lines(self, target, depth, branches, least, errors, group, max_lines)
        return "\n".join(line.text for line in text)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        max_nodes: int = 40,
        target: int = 0,
        group: bool | Sequence[Supernode] = True,
        errors: bool = False,
    ) -> Picture:
        """Draw a picture, SVG: tokens as columns, layers as rows, targets on top; notebooks show it.

        After pruning, the max_nodes most influential boxes are drawn, in as many columns as fit into 1,600 pixels;
        the strongest path that supports `target` is marked. Edges that lower are dashed.

        path: a file to write as well. group: features of one label at one position are one box, at the lowest of
        their layers, with the sums of their weights; or a list of supernodes that are one box each. errors: draw
        those of each column as one box.
        """
        svg_path = None if path is None else writable_svg("plot", path)
        picture = plot(self.prune(node_threshold, edge_threshold), max_nodes, target, group, errors)
        if svg_path is not None:
            write_text("plot", svg_path, picture.svg)
        return picture

    def to_html(
        self,
        path: str | os.PathLike[str],
        node_threshold: float = 0.95,
        edge_threshold: float = 0.99,
        max_nodes: int = 1000,
    ) -> None:
        """Write the interactive page with this graph in it as one HTML file, which needs no server and no network.

        The file holds what pruning at these thresholds leaves; its sliders prune further.
        """
        import_module("pycircuit.page.embed").to_html(self, path, node_threshold, edge_threshold, max_nodes)

    def show(self, node_threshold: float = 0.95, edge_threshold: float = 0.99, max_nodes: int = 1000) -> Any:
        """Show the interactive page in a notebook, as `to_html` writes it; asks for `pycircuit[notebook]`."""
        return import_module("pycircuit.page.embed").show(self, node_threshold, edge_threshold, max_nodes)

    def subgraph(self, node_mask: Any, edge_mask: Any = None) -> Graph:
        """Graph of the nodes in node_mask, [nodes], and the edges in edge_mask, [entries].

        Other features and targets are removed; errors and tokens keep their index and lose their edges. Removed
        edges are added to `dropped`, so the certificate still holds.
        """
        return subgraph(self, node_mask, edge_mask)

    # Files and other libraries

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically."""
        graph_file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Graph:
        """Read a file that `save` wrote; GraphFileError, naming file and tensor, for any other."""
        return graph_file.load(cls, path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], tokenizer: Any = None) -> Graph:
        """Read a graph file by its ending: .safetensors as `load`, .json as `from_json`, .pt as `from_circuit_tracer`.

        tokenizer: turns the ids of a .pt file into text.
        """
        return open_graph.open_graph(cls, path, tokenizer)

    def to_json(
        self,
        path: str | os.PathLike[str],
        slug: str | None = None,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        scan: str | None = None,
        *,
        flavour: Flavour = "circuit-tracer",
        feature_details: Mapping[str, str] | None = None,
        groups: Groups | None = None,
        pinned: Sequence[int] | None = None,
    ) -> str:
        """Write the pruned graph as JSON for circuit-tracer's page or Neuronpedia's; return the query of its address.

        slug: the graph's name there, the file's by default. scan: for circuit-tracer the set of transcoders, under
        which its page looks for labels and beside which graph-metadata.json lists the graph; for Neuronpedia the id of
        the model. feature_details: where Neuronpedia finds cards, {"neuronpedia_source_set": ...} or
        {"feature_json_base_url": ...}. groups: (name, nodes) of each, the most influential supernodes by default;
        their nodes and those of `pinned` are pinned, and written whatever the thresholds.
        """
        options = PageOptions(slug, node_threshold, edge_threshold, scan, flavour, feature_details, groups, pinned)
        return page_json.to_json(self, path, options)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Graph:
        """Read a graph in the JSON of circuit-tracer's page or Neuronpedia's; GraphFileError for any other.

        The file has the edges that pruning left and no pre-activations, so `certificate` is NaN. Its pins and groups
        are in provenance["page"].
        """
        return page_reader.load(cls, path)

    @classmethod
    def from_circuit_tracer(cls, path: str | os.PathLike[str], tokenizer: Any = None) -> Graph:
        """Read a `.pt` graph that circuit-tracer saved, without running anything in it; GraphFileError for any other.

        tokenizer: turns ids into text; without it a token's text is its number. The file has no pre-activations, so
        `certificate` is NaN, and it has edges from selected features only.
        """
        return circuit_tracer_graph.load(cls, path, tokenizer)

    def to_circuit_tracer(
        self, path: str | os.PathLike[str], tokenizer_name: str | None = None, scan: str | None = None
    ) -> None:
        """Write a `.pt` graph for circuit-tracer's Graph.from_pt: nodes x nodes, the features with rows selected.

        tokenizer_name, scan: the tokenizer and the transcoders that its page looks for; None: those of the provenance.
        """
        circuit_tracer_graph.save(self, path, tokenizer_name, scan)

    def tables(self) -> dict[str, Table]:
        """Columns of two tables, "nodes" and "edges", as pandas.DataFrame and polars.DataFrame take them.

        -1, NaN and "" stand for what a node does not have.
        """
        return tables.tables(self)

    def to_parquet(self, folder: str | os.PathLike[str]) -> None:
        """Write nodes.parquet and edges.parquet, for pandas, Polars or DuckDB, with nulls for what a node has not."""
        tables.to_parquet(self, folder)

    def to_graphml(self, path: str | os.PathLike[str]) -> None:
        """Write GraphML, for Gephi, Cytoscape and others: nodes and edges with the columns of `tables`."""
        graphml.to_graphml(self, path)

    def to_networkx(self) -> Any:
        """A networkx.DiGraph, edges from source to target with `weight`; node attributes as in `describe`."""
        return libraries.to_networkx(self)

    def to_scipy(self) -> Any:
        """A scipy.sparse.csr_array [nodes, nodes]: row = target, column = source."""
        return libraries.to_scipy(self)

    def _repr_html_(self) -> str:
        return graph_html(self)

    def __repr__(self) -> str:
        return (
            f"Graph(features={len(self.features)}, layers={self.layers}, positions={self.positions}, "
            f"targets={len(self.targets)}, rows={self.rows.count}, edges={self.rows.entries})"
        )
