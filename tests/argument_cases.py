"""Valid calls of every op, and changes of their arguments that must be refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pycircuit as pc
from pycircuit.ops import StoredAttention, cases

Change = Callable[[Any], Any]


def valid_call(op: str) -> dict[str, Any]:
    """Arguments of a small valid call; an output is larger than any input."""
    g = cases.generator(3)
    features = pc.SparseFeatures(torch.tensor([0, 2, 2, 5]), torch.tensor([1, 4, 0, 2, 5]), torch.rand(5, generator=g))
    ptr = torch.tensor([0, 1, 3])
    calls: dict[str, dict[str, Any]] = {
        "encode": {"x": torch.randn(3, 4), "w_enc": torch.randn(6, 4), "b_enc": torch.randn(6),
                   "activation": pc.JumpReLU(torch.rand(6)), "ignore_positions": 0},
        "decode": {"features": features, "w_dec": torch.randn(6, 2, 4), "bias": torch.randn(2, 4)},
        "attend_back": {"y": torch.randn(3, 4, 5), "prefix_ptr": ptr,
                        "attention": cases.recomputed(g, 4, 2, 3, 6, sinks=torch.zeros(4)), "out": None},
        "edge_scores": {"gradient": torch.randn(3, 4), "prefix_ptr": ptr, "features": features,
                        "w_dec": torch.randn(6, 4), "out": torch.zeros(2, 5)},
        "influence": {"rows": torch.tensor([[0.0, 1.0, 0.0], [9.0, 9.0, 9.0], [1.0, 2.0, 3.0]]),
                      "node": torch.tensor([-1, 0]), "weight": torch.tensor([1.0, 0.0]),
                      "order": torch.tensor([2, 0])},
    }  # fmt: skip
    return calls[op]


ARRAYS = {  # paths of the array arguments of each op
    "encode": ("x", "w_enc", "b_enc", "activation.theta"),
    "decode": ("features.row_ptr", "features.index", "features.value", "w_dec", "bias"),
    "attend_back": ("y", "prefix_ptr", "attention.query", "attention.key", "attention.log_sum_exp",
                    "attention.sinks"),
    "edge_scores": ("gradient", "prefix_ptr", "features.row_ptr", "features.index", "features.value", "w_dec", "out"),
    "influence": ("rows", "node", "weight", "order"),
}  # fmt: skip
EVERY_ARRAY = [(op, path) for op, paths in ARRAYS.items() for path in paths]
STORED = ("attend_back", "attention.pattern")


def get(args: dict[str, Any], path: str) -> Any:
    """Return the argument, or the field of an argument, at a path such as features.index."""
    name, _, field = path.partition(".")
    return getattr(args[name], field) if field else args[name]


def put(args: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return the arguments with another value at a path."""
    name, _, field = path.partition(".")
    return {**args, name: replace(args[name], **{field: value}) if field else value}


def valid_call_with(op: str, path: str) -> dict[str, Any]:
    """Arguments of a valid call that has a value at `path`."""
    args = valid_call(op)
    if path == "attention.pattern":
        args["attention"] = StoredAttention(cases.attention_weights(cases.generator(), 4, 3), 2)
    return args


class Allocations(TorchDispatchMode):
    """Largest new tensor of any torch operation, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor) and not a.is_sparse}
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and t.layout == torch.strided and t.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


def refuses(op: str, args: dict[str, Any], name: str, rule: str, error: type[Exception]) -> None:
    """Assert that a call raises this error, names the argument, and allocates nothing."""
    with Allocations() as allocations, pytest.raises(error) as caught:
        getattr(pc.ops, op)(**args)
    assert allocations.largest <= 128  # flags and scalars; the smallest result of a valid call is larger
    message = str(caught.value)
    assert re.match(rf"{op}: {re.escape(name)} must .+, got .+", message), message
    assert re.search(rule, message), message


def same_values(a: Any, b: Any) -> bool:
    """Compare two results of an op bit by bit."""
    if isinstance(a, pc.SparseFeatures):
        return all(same_values(u, v) for u, v in zip(vars(a).values(), vars(b).values(), strict=True) if u is not None)
    return torch.equal(a, b)
