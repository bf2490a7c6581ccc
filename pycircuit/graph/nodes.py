"""Nodes of a graph: their numbers, and what each of them is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pycircuit.ops import checks

from .csr import index_below
from .endpoints import Targets, Tokens


class Nodes:
    """Numbering of a graph's nodes: features, errors (layer-major, layers x positions), tokens, targets."""

    features: Tensor
    values: Tensor
    targets: Targets
    tokens: Tokens
    layers: int
    labels: dict[tuple[int, int], str]
    automatic_labels: dict[tuple[int, int], str]

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
        """Number of nodes."""
        return self.first_target + len(self.targets)

    def feature_node(self, layer: int, position: int, feature: int) -> int:
        """Node of a feature; KeyError if it is not active."""
        names = {"layer": layer, "position": position, "feature": feature}
        triple = [min(checks.whole_number("Graph.feature_node", name, n, -(2**63)), 2**62) for name, n in names.items()]
        matches = (self.features == self.features.new_tensor(triple)).all(1).nonzero()
        if not len(matches):
            raise KeyError(f"Graph.feature_node: feature must be active, got layer {layer}, {position=}, {feature=}")
        return int(matches[0, 0])

    def error_node(self, layer: int, position: int) -> int:
        """Node of the reconstruction error of a layer at a position."""
        layer = index_below("Graph.error_node", "layer", layer, self.layers)
        position = index_below("Graph.error_node", "position", position, self.positions)
        return self.first_error + layer * self.positions + position

    def token_node(self, position: int) -> int:
        """Node of the token at a position."""
        return self.first_token + index_below("Graph.token_node", "position", position, self.positions)

    def target_node(self, target: int = 0) -> int:
        """Node of a target."""
        return self.first_target + index_below("Graph.target_node", "target", target, len(self.targets))

    def label(self, layer: int, feature: int) -> tuple[str, bool]:
        """Label of a feature, and True if it is automatic rather than a name; ("", False) where it has none."""
        key = (layer, feature)
        if key in self.labels:
            return self.labels[key], False
        return self.automatic_labels.get(key, ""), key in self.automatic_labels

    def describe(self, node: int) -> dict[str, Any]:
        """Description of a node: its kind, and its layer, position, feature, value, token, label, automatic, weight.

        automatic: of a feature with a label, True unless the label is a name.
        """
        node = index_below("Graph.describe", "node", node, self.nodes)
        if node < self.first_error:
            layer, position, feature = self.features[node].tolist()
            value = float(self.values[node])
            text, automatic = self.label(layer, feature)
            label = {"label": text, "automatic": automatic} if text else {}
            return {"kind": "feature", "layer": layer, "position": position, "feature": feature, "value": value} | label
        if node < self.first_token:
            layer, position = divmod(node - self.first_error, self.positions)
            return {"kind": "error", "layer": layer, "position": position}
        if node < self.first_target:
            position = node - self.first_token
            token, text = int(self.tokens.ids[position]), self.tokens.text[position]
            return {"kind": "token", "position": position, "token": token, "label": text}
        target = node - self.first_target
        return {
            "kind": "target",
            "position": int(self.targets.positions[target]),
            "token": int(self.targets.ids[target]),
            "label": self.targets.labels[target],
            "weight": float(self.targets.weights[target]),
        }
