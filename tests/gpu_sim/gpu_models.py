"""Models on the pretended device, and comparisons of their graphs with the CPU's."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import builders
import torch
from builders import transcoders

import pycircuit as pc


@lru_cache(maxsize=2)
def language_model(family: str, device: str) -> Any:
    return builders.build(family).to(device)


def replacement_model(family: str, kind: str, device: str) -> pc.ReplacementModel:
    return pc.ReplacementModel(language_model(family, device), transcoders(kind, torch.float32).to(device))


def compare(graph: pc.Graph, truth: pc.Graph) -> None:
    """Check that rows are of the same features, that edges agree, and that the law holds."""
    assert graph.certificate < 1e-5
    assert torch.equal(graph.features, truth.features) and torch.equal(graph.row_node, truth.row_node)
    edges, expected = (g.dense()[g.row_node] for g in (graph, truth))
    assert float(((edges - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-5


def call_sites(counter: Counter[str]) -> str:
    """Return the commonest call sites of a counter, one a line."""
    return "\n".join(f"{count:6d}  {site}" for site, count in counter.most_common(40))
