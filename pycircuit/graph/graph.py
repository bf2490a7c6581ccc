"""The attribution graph: what a trace found, as arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycircuit.ops import checks

from . import influence
from . import paths as strongest
from . import prune as pruning
from . import scores as scoring
from . import supernodes as grouping
from .csr import Rows, below
from .faithfulness import KEY, Faithfulness
from .invariants import validate
from .io import circuit_tracer_graph, graph_file, page_json
from .io import libraries as converting
from .show import plot as drawing
from .show import tree as drawing_tree


@dataclass(frozen=True, eq=False)
class Tokens:
    """The prompt. ids: [positions] int64; text: the string of each."""

    ids: Tensor
    text: Sequence[str]


@dataclass(frozen=True, eq=False)
class Targets:
    """What is explained. labels: a name each; ids: [targets] int64 token ids, -1 for what is no token;

    weights: [targets] probabilities or the weights given; positions: [targets] int64.
    """

    labels: Sequence[str]
    ids: Tensor
    weights: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Graph:
    """Direct effects of features, errors and tokens on features and targets, for one prompt. Lives on the CPU.

    Nodes, in the order of columns: features, errors (layer-major, layers x positions), tokens, targets.

    features: [n, 3] int64 layer, position, feature.      values: [n], how active each is.
    rows: one CSR row for each of row_node, [rows] int64: targets and the features that were expanded.
    bias: [rows], what reaches a row from no node.        preactivation: [rows], what edges and bias add up to:
        the pre-activation without the encoder's own bias (for a target its logit, centred as it was traced).
    product_norm: [rows], the norm of the products of encoder row and input that the pre-activation is the sum of:
        what rounding has to work on where that sum cancels; zeros where it is not known.
    dropped, dropped_mass: [rows], the sum of the entries a compressed row leaves out, and of their absolute values.
    labels: what features stand for, by (layer, feature), where that is known.
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

    def __post_init__(self) -> None:
        for name, value in validate(self).items():
            object.__setattr__(self, name, value)

    # Nodes

    @property
    def positions(self) -> int:
        return len(self.tokens.text)

    @property
    def first_error(self) -> int:
        return len(self.features)

    @property
    def first_token(self) -> int:
        return self.first_error + self.layers * self.positions

    @property
    def first_target(self) -> int:
        return self.first_token + self.positions

    @property
    def nodes(self) -> int:
        """How many there are."""
        return self.first_target + len(self.targets)

    def feature_node(self, layer: int, position: int, feature: int) -> int:
        """The node of a feature; KeyError where it is not active."""
        names = {"layer": layer, "position": position, "feature": feature}
        wanted = [min(checks.whole_number("Graph.feature_node", name, n, -(2**63)), 2**62) for name, n in names.items()]
        found = (self.features == self.features.new_tensor(wanted)).all(1).nonzero()
        if not len(found):
            raise KeyError(f"Graph.feature_node: feature must be active, got layer {layer}, {position=}, {feature=}")
        return int(found[0, 0])

    def error_node(self, layer: int, position: int) -> int:
        layer = below("Graph.error_node", "layer", layer, self.layers)
        position = below("Graph.error_node", "position", position, self.positions)
        return self.first_error + layer * self.positions + position

    def token_node(self, position: int) -> int:
        return self.first_token + below("Graph.token_node", "position", position, self.positions)

    def target_node(self, target: int = 0) -> int:
        return self.first_target + below("Graph.target_node", "target", target, len(self.targets))

    def describe(self, node: int) -> dict[str, Any]:
        """kind, and what names the node: layer, position, feature, value, token, label, weight."""
        node = below("Graph.describe", "node", node, self.nodes)
        if node < self.first_error:
            layer, position, feature = self.features[node].tolist()
            value = float(self.values[node])
            named = {"label": self.labels[layer, feature]} if (layer, feature) in self.labels else {}
            return {"kind": "feature", "layer": layer, "position": position, "feature": feature, "value": value} | named
        if node < self.first_token:
            layer, position = divmod(node - self.first_error, self.positions)
            return {"kind": "error", "layer": layer, "position": position}
        if node < self.first_target:
            at = node - self.first_token
            return {"kind": "token", "position": at, "token": int(self.tokens.ids[at]), "label": self.tokens.text[at]}
        t = node - self.first_target
        position, token, weight = self.targets.positions[t], self.targets.ids[t], self.targets.weights[t]
        return {"kind": "target", "position": int(position), "token": int(token), "label": self.targets.labels[t],
                "weight": float(weight)}  # fmt: skip

    # The law

    @property
    def residual(self) -> Tensor:
        """Relative violation of the conservation law, row by row: [rows] float64.

        |edges + dropped + bias - preactivation| over the sum of the absolute values of all these terms, or over
        `product_norm` where that is larger: rows whose large terms cancel, among edges or inside the dot product
        that the pre-activation is, are measured by the terms, not by the small number they add up to. NaN for a graph
        from a file that does not say what its rows should add up to.
        """
        if self.provenance.get("law") == "unknown":
            return torch.full((self.rows.count,), torch.nan, dtype=torch.float64, device="cpu")
        expected, weight = _array(self.preactivation), self.rows.weight.numpy()
        off = _array(self.dropped) + _array(self.bias) - expected
        scale = _array(self.dropped_mass) + np.abs(_array(self.bias)) + np.abs(expected)
        for block in self.rows.blocks():
            terms = block.take(weight).astype(np.float64)
            off[block.rows] += block.reduce(np.add, terms)
            scale[block.rows] += block.reduce(np.add, np.abs(terms, out=terms))
        np.maximum(scale, _array(self.product_norm), out=scale)
        return torch.from_numpy(np.divide(np.abs(off), scale, out=np.zeros_like(off), where=scale > 0))

    @property
    def certificate(self) -> float:
        """The largest relative violation of the conservation law in any row; 0 for a graph without rows."""
        return float(self.residual.max()) if self.rows.count else 0.0

    @property
    def faithfulness(self) -> Faithfulness | None:
        """What pc.validate found: how well the graph foretells interventions; None before."""
        found = self.provenance.get(KEY)
        return None if found is None else Faithfulness.from_dict(found)

    # Views

    def dense(self) -> Tensor:
        """[nodes, nodes]: row = target, column = source. Nodes without a row have zeros there."""
        out = self.rows.weight.new_zeros(self.nodes, self.nodes)
        for r, node in enumerate(self.row_node.tolist()):
            column, weight = self.rows.row(r)
            out[node, column.long()] = weight
        return out

    def influence(self) -> Tensor:
        """Influence of every node on the targets, by their weights: [nodes] float64."""
        return torch.from_numpy(influence.of_nodes(self))

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> pruning.Pruned:
        """The nodes and edges that carry these shares of the influence; `.graph` is the graph of them alone."""
        return pruning.prune(self, node_threshold, edge_threshold)

    def scores(self) -> scoring.Scores:
        """(replacement, completeness): how much of the influence runs through features rather than errors."""
        return scoring.scores(self)

    def paths(self, source: int, target: int, k: int = 1) -> list[strongest.Path]:
        """The k strongest paths from node to node, strongest first."""
        return strongest.paths(self, source, target, k)

    def supernodes(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> list[grouping.Supernode]:
        """Kept features that a reader takes as one: those of one label, or of no label and one feature, at a place.

        Two or more nodes each; the most influential group first.
        """
        return grouping.supernodes(self.prune(node_threshold, edge_threshold))

    def tree(self, target: int = 0, depth: int = 5, branches: int = 3, least: float = 0.02) -> str:
        """What a target comes from, as indented text: its strongest inputs, theirs below them, to the tokens.

        branches: inputs shown of a node; depth: levels below the target; least: share of a row's mass that an input
        must have. The strongest path from a token is always there, marked; a node already shown is not unfolded again.
        """
        return "\n".join(line.text for line in drawing_tree.lines(self, target, depth, branches, least))

    def plot(
        self,
        path: str | os.PathLike[str],
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        max_nodes: int = 40,
        target: int = 0,
        group: bool = True,
    ) -> None:
        """Write a picture, SVG: tokens as columns, layers as rows, targets on top.

        Of what pruning keeps the max_nodes most influential boxes are drawn; the strongest path to `target` is marked.
        group: features of one label at one position are one box, which stands at the lowest layer of theirs and
        has the sums of their weights.
        """
        drawing.plot(self, path, node_threshold, edge_threshold, max_nodes, target, group)

    def subgraph(self, node_mask: Any, edge_mask: Any = None) -> Graph:
        """The graph of the nodes in node_mask: [nodes], and of the edges in edge_mask: [entries].

        Features and targets outside are gone; errors and tokens keep their place in the order and lose their
        edges. What rows lose goes to `dropped`, so the certificate still holds.
        """
        return pruning.subgraph(self, node_mask, edge_mask)

    # Out and in

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, all of it or nothing."""
        graph_file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Graph:
        """Read what `save` wrote; GraphFileError, naming file and tensor, for anything else."""
        return graph_file.load(cls, path)

    def to_json(
        self,
        path: str | os.PathLike[str],
        slug: str | None = None,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        scan: str | None = None,
    ) -> str:
        """Write the pruned graph as JSON for circuit-tracer's page, and enter it in graph-metadata.json beside it.

        slug: the graph's name there, the file's by default. scan: the set of transcoders, under which the page looks
        for labels; provenance["scan"] by default, "local" where there is none. Supernodes are pinned, the most
        influential of them, up to 200 nodes. Returns the query of the address, `index.html?...`, that shows them on
        circuit-tracer's page; Neuronpedia's has them from the file, and opens no graph of layer 0 alone (a warning).
        """
        return page_json.to_json(self, path, slug, node_threshold, edge_threshold, scan)

    @classmethod
    def from_circuit_tracer(cls, path: str | os.PathLike[str], tokenizer: Any = None) -> Graph:
        """Read a `.pt` graph that circuit-tracer saved; nothing in it is run. GraphFileError for anything else.

        tokenizer: what turns ids into text; without it a token's text is its number. The file does not say what rows
        should add up to, so `certificate` is NaN, and it has edges from selected features only.
        """
        return circuit_tracer_graph.load(cls, path, tokenizer)

    def to_circuit_tracer(
        self, path: str | os.PathLike[str], tokenizer_name: str | None = None, scan: str | None = None
    ) -> None:
        """Write a `.pt` graph for circuit-tracer's Graph.from_pt: nodes x nodes, features that have rows selected.

        tokenizer_name, scan: the tokenizer and the transcoders that its page looks for; None: those of the provenance.
        """
        circuit_tracer_graph.save(self, path, tokenizer_name, scan)

    def to_networkx(self) -> Any:
        """A networkx.DiGraph, edges from source to target with `weight`; node attributes as in `describe`."""
        return converting.to_networkx(self)

    def to_scipy(self) -> Any:
        """A scipy.sparse.csr_array [nodes, nodes]: row = target, column = source."""
        return converting.to_scipy(self)

    def __repr__(self) -> str:
        return (
            f"Graph(features={len(self.features)}, layers={self.layers}, positions={self.positions}, "
            f"targets={len(self.targets)}, rows={self.rows.count}, edges={self.rows.entries})"
        )


def _array(t: Tensor | None) -> np.ndarray:
    assert t is not None  # validate() has filled it
    return t.numpy().astype(np.float64)
