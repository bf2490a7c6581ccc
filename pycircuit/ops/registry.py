"""The table of ops: argument order and implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

IMPLEMENTATIONS = ("native", "triton", "reference")
MODULES = {
    "native": "pycircuit.ops.native",
    "triton": "pycircuit.kernels.{op}",
    "reference": "pycircuit.ops.reference",
}


@dataclass(frozen=True)
class Op:
    name: str
    parameters: tuple[str, ...]
    summary: str

    def form(self, implementation: str) -> Callable[..., Any]:
        """Function that implements this op: same name and parameters in every form."""
        module = import_module(MODULES[implementation].format(op=self.name))
        return getattr(module, self.name)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("encode", ("x", "w_enc", "b_enc", "activation", "ignore_positions"), "activations to features"),
        Op("decode", ("features", "w_dec", "bias"), "features to the stream"),
        Op("attend_back", ("y", "prefix_ptr", "attention", "out"), "gradients through frozen attention"),
        Op("edge_scores", ("gradient", "prefix_ptr", "features", "w_dec", "out"), "gradients to edges"),
        Op("influence", ("rows", "node", "weight", "order"), "edges to influence on the output"),
    )
}
