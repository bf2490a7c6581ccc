"""A drop-in for circuit-tracer's `attribute`: its models, transcoders and arguments in, its `Graph` out.

    from pycircuit.integrations.circuit_tracer import attribute

in place of `from circuit_tracer import attribute`, or `accelerate()` once in a program that cannot be changed.
"""

from .attribution import attribute
from .graph_files import create_graph_files
from .graphs import compute_graph_scores, prune_graph
from .patch import Accelerated, accelerate

__all__ = ["Accelerated", "accelerate", "attribute", "compute_graph_scores", "create_graph_files", "prune_graph"]
