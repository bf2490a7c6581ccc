"""A drop-in for circuit-tracer's `attribute`: its models, transcoders and arguments in, its `Graph` out.

    from pycircuit.integrations.circuit_tracer import attribute

in place of `from circuit_tracer import attribute`, or `accelerate()` once in a program that cannot be changed.
"""

from .attribution import attribute
from .patch import Accelerated, accelerate

__all__ = ["Accelerated", "accelerate", "attribute"]
