"""Tests of the demo model's graphs: shares of concepts and routes, by hand and for Dallas."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from graphs import assemble, random_graph

import pycircuit as pc
from pycircuit.demo.circuit_shares import ROUTE, circuit_shares, concepts, route_shares
from pycircuit.demo.facts import facts
from pycircuit.demo.swap import two_hop
from pycircuit.graph import influence

pytestmark = pytest.mark.usefixtures("one_thread")

KNOWN = facts()


def test_shares_of_concepts_and_routes_by_hand() -> None:
    """Two features and an error feed the target: 6 : 3 : 1; the first reads the second and a token, 1 : 3."""
    # Nodes: features 0 (state), 1 (answer), errors 2 and 3, token 4, target 5.
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[5, 1], matrix[5, 0], matrix[5, 3] = 6, -3, 1
    matrix[1, 0], matrix[1, 4] = 1, 3
    matrix[0, 4] = 2
    graph = assemble(matrix, [[0, 0, 5], [1, 0, 6]], 2, 1, [1.0])
    concept = ["state", "answer", "errors", "errors", "city", "output"]
    routes = route_shares(graph, concept)
    assert routes == pytest.approx({
        ("errors", "output"): 0.1, ("city", "state", "output"): 0.3, ("city", "answer", "output"): 0.45,
        ("city", "state", "answer", "output"): 0.15,
    })  # fmt: skip
    shares = circuit_shares(graph, concept)
    assert shares.named == pytest.approx(0.9) and shares.errors == pytest.approx(0.1)
    assert shares.route == pytest.approx(0.45) and shares.concepts in {ROUTE, ("city", "answer")}


def test_routes_from_errors_carry_what_arrives_at_errors() -> None:
    graph = random_graph(12, seed=3)
    concept = [str(random.Random(node).randrange(4)) for node in range(graph.nodes)]
    for node in range(graph.first_error, graph.first_token):
        concept[node] = "errors"
    routes = route_shares(graph, concept)
    weights = np.zeros(graph.nodes)
    weights[graph.target_node(0)] = 1.0
    mass = influence.propagate(graph, graph.rows, influence.scales(graph.rows), weights)
    expected = mass[graph.first_error : graph.first_token].sum()
    assert expected > 0.05 and sum(routes.values()) <= 1 + 1e-9
    assert sum(share for route, share in routes.items() if route[0] == "errors") == pytest.approx(expected, abs=0.01)


def test_circuit_of_dallas() -> None:
    """Concepts of the real graph: the city's token, its state, the question; what is left over is not named."""
    graph = pc.attribute(pc.load("demo"), two_hop("Dallas"), progress=False)
    concept = concepts(graph, KNOWN, "Dallas")
    assert [concept[graph.token_node(7)], concept[graph.target_node(0)]] == ["city", "output"]
    assert {"state", "question", "errors"} <= set(concept) and "Texas" not in concept
    shares = circuit_shares(graph, concept)
    assert shares.errors == pytest.approx(1 - graph.scores().replacement, abs=1e-6)
    assert 0.3 < shares.named < 1 and 0 < shares.route <= shares.strongest
    blind = circuit_shares(graph, ["other" if c in ("state", "question", "answer") else c for c in concept])
    assert blind.named == 0 and blind.route == 0 and blind.errors == shares.errors
