"""Changes of features that a browser asks for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from pycircuit.graph import Graph
from pycircuit.interventions import Intervention
from pycircuit.interventions.intervention import FREEZE, Freeze

from .edit_document import node_list
from .node_ids import node_of

OP = "page"
MOST_NODES, MOST_GENERATED = 2000, 200
_ACTIONS = ("value", "scale", "ablate")


@dataclass(frozen=True)
class FeatureChange:
    """A new activation of one feature: `value`, or `factor` times its own. position: None for everywhere."""

    layer: int
    position: int | None
    feature: int
    value: float | None
    factor: float | None

    def intervention(self) -> Intervention:
        """Return it for pc.intervene and pc.generate."""
        return Intervention(self.layer, self.position, self.feature, self.value, self.factor)


@dataclass(frozen=True)
class ChangeRequest:
    """Changes, the values that stay, tokens to generate, and nodes to watch beside the pinned ones."""

    changes: tuple[FeatureChange, ...]
    freeze: Freeze
    generate: int
    watched: tuple[str, ...]

    @classmethod
    def of(cls, graph: Graph, body: dict[str, Any]) -> ChangeRequest:
        """Read a body."""
        changes = body.get("changes")
        if not isinstance(changes, list) or not 0 < len(changes) <= MOST_NODES:
            raise ValueError(f"{OP}: changes must be a list of 1 to {MOST_NODES}")
        freeze = body.get("freeze", "attention")
        if freeze not in FREEZE:
            raise ValueError(f"{OP}: freeze must be one of {', '.join(FREEZE)}, got {str(freeze)[:40]!r}")
        count = body.get("generate", 0)
        if type(count) is not int or not 0 <= count <= MOST_GENERATED:
            raise ValueError(f"{OP}: generate must be a whole number from 0 to {MOST_GENERATED}")
        watched = node_list("nodes", body.get("nodes", []))[:MOST_NODES]
        distinct: dict[tuple[int, int | None, int], FeatureChange] = {}
        for change in changes:
            for single in _feature_changes(graph, change):
                key = (single.layer, single.position, single.feature)
                if distinct.setdefault(key, single) != single:
                    raise ValueError(f"{OP}: changes must name a feature once, got {key} with two values")
        _require_no_overlap(distinct)
        return cls(tuple(distinct.values()), freeze, count, tuple(watched))


def _require_no_overlap(changes: dict[tuple[int, int | None, int], FeatureChange]) -> None:
    """Raise if a feature is changed both everywhere and at a position."""
    everywhere = {(layer, feature) for layer, position, feature in changes if position is None}
    both = [key for key in changes if key[1] is not None and (key[0], key[2]) in everywhere]
    if both:
        layer, position, feature = both[0]
        raise ValueError(f"{OP}: changes must name {layer}/{position}/{feature} everywhere or there, got both")


def _feature_changes(graph: Graph, change: object) -> list[FeatureChange]:
    """Changes of the features of one entry: {node or nodes, value or scale or ablate, everywhere}."""
    if not isinstance(change, dict):
        raise ValueError(f"{OP}: a change must be an object, got {type(change).__name__}")
    actions = [name for name in _ACTIONS if change.get(name) is not None and change[name] is not False]
    if len(actions) != 1 or ("node" in change) == ("nodes" in change):
        raise ValueError(f"{OP}: a change must have node or nodes, and one of {', '.join(_ACTIONS)}")
    number = 0.0 if actions[0] == "ablate" else change[actions[0]]
    if type(number) not in (int, float) or not isfinite(number) or abs(number) > 1e9:
        raise ValueError(f"{OP}: {actions[0]} must be a finite number")
    value, factor = (None, float(number)) if actions[0] == "scale" else (float(number), None)
    everywhere = change.get("everywhere", False)
    if type(everywhere) is not bool:
        raise ValueError(f"{OP}: everywhere must be true or false")
    out = []
    for identifier in node_list("nodes", change["nodes"] if "nodes" in change else [change["node"]]):
        node = node_of(graph, identifier)
        if node >= graph.first_error:
            raise ValueError(f"{OP}: a change must be of a feature, got {identifier}")
        layer, position, feature = graph.features[node].tolist()
        out.append(FeatureChange(layer, None if everywhere else position, feature, value, factor))
    if not out:
        raise ValueError(f"{OP}: a change must name at least one node, got none")
    return out
