"""Shares of the influence on an answer that named concepts and routes between them carry.

Influence starts at the answer and goes back by shares: a node hands its influence on to the sources of its row, each
by its |weight| over the sum of the row's. It ends at tokens and at errors. A concept is a set of nodes: the city's
token, features named after its state, after the question or after the answer, all errors, other words' tokens, and
other features by name. A route is the sequence of concepts that influence goes through, equal neighbours joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pycircuit.graph import influence

from .facts import Facts

if TYPE_CHECKING:
    from pycircuit.graph import Graph

CITY, STATE, QUESTION, ANSWER, ERRORS, OUTPUT = "city", "state", "question", "answer", "errors", "output"
NAMED = (STATE, QUESTION, ANSWER)
ROUTE = (CITY, STATE, ANSWER)
_LEAST = 1e-5  # of the influence: a weaker route is not followed


class CircuitShares(NamedTuple):
    """Shares of the influence on an answer.

    named: passes through a feature of the state, the question or the answer; errors: ends at errors; route: goes from
    the city through its state to the answer; strongest: of the strongest route, whose concepts are `concepts`.
    """

    named: float
    errors: float
    route: float
    strongest: float
    concepts: tuple[str, ...]


def concepts(graph: Graph, facts: Facts, city: str) -> list[str]:
    """The concept of every node of a two-hop question's graph."""
    state = facts.state[city]
    named = {state: STATE, "asks for a capital": QUESTION, f"say {facts.capital[state]}": ANSWER}
    out = []
    for node in range(graph.nodes):
        if graph.first_error <= node < graph.first_token:
            out.append(ERRORS)
        elif graph.first_token <= node < graph.first_target:
            text = graph.tokens.text[node - graph.first_token]
            out.append(CITY if text == city else f"“{text}” token")
        elif node >= graph.first_target:
            out.append(OUTPUT)
        else:
            layer, _, feature = graph.features[node].tolist()
            label = graph.labels.get((layer, feature), "unnamed")
            out.append(named.get(label, label))
    return out


def circuit_shares(graph: Graph, concept: Sequence[str], target: int = 0) -> CircuitShares:
    """Shares of the influence on a target. concept: of every node."""
    named = 0.0
    routes: dict[tuple[str, ...], float] = {}
    for route, share in route_shares(graph, concept, target).items():
        named += share * any(c in NAMED for c in route)
        ends = route[:-1]
        merged = (*ends, *((ANSWER,) if ends[-1:] != (ANSWER,) else ()))
        routes[merged] = routes.get(merged, 0.0) + share
    strongest = max(routes, key=lambda route: routes[route])
    return CircuitShares(named, error_share(graph, target), routes.get(ROUTE, 0.0), routes[strongest], strongest)


def route_shares(graph: Graph, concept: Sequence[str], target: int = 0) -> dict[tuple[str, ...], float]:
    """Share of the influence on a target that each route carries; routes begin where influence ends."""
    scale, row_node = influence.scales(graph.rows), graph.row_node.tolist()
    arriving: dict[int, dict[tuple[str, ...], float]] = {graph.target_node(target): {(OUTPUT,): 1.0}}
    ended: dict[tuple[str, ...], float] = {}
    for r in np.concatenate(influence.layer_groups(graph)).tolist():
        routes = arriving.pop(row_node[r], None)
        if routes is None:
            continue
        column, weight = (t.numpy() for t in graph.rows.row(r))
        for source, share in zip(column.tolist(), (np.abs(weight) * scale[r]).tolist(), strict=True):
            into = arriving.setdefault(source, {})
            for route, carried in routes.items():
                if carried * share >= _LEAST:
                    extended = route if route[0] == concept[source] else (concept[source], *route)
                    into[extended] = into.get(extended, 0.0) + carried * share
    for routes in arriving.values():
        for route, share in routes.items():
            ended[route] = ended.get(route, 0.0) + share
    return ended


def error_share(graph: Graph, target: int = 0) -> float:
    """Share of the influence on a target that ends at errors."""
    weights = np.zeros(graph.nodes)
    weights[graph.target_node(target)] = 1.0
    total = influence.propagate(graph, graph.rows, influence.scales(graph.rows), weights)
    errors = float(total[graph.first_error : graph.first_token].sum())
    return errors / (errors + float(total[graph.first_token : graph.first_target].sum()))
