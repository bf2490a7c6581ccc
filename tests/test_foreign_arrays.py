"""Arrays of NumPy and of DLPack, and tensors that require gradients, as arguments of every op."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from argument_cases import (
    EVERY_ARRAY,
    STORED,
    Change,
    get,
    put,
    refuses,
    same_values,
    valid_call,
    valid_call_with,
)
from torch import Tensor

import pycircuit as pc


class OnlyDLPack:
    """Array of another library: only the two methods of the protocol."""

    def __init__(self, t: Tensor) -> None:
        self._t = t

    def __dlpack__(self, stream: Any = None, **_: Any) -> Any:
        return self._t.detach().__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._t.__dlpack_device__()


class BrokenDLPack:
    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("cannot export")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def _read_only(t: Tensor) -> Any:
    array = t.numpy().copy()
    array.flags.writeable = False
    return array


FOREIGN: dict[str, Change] = {
    "numpy": lambda t: t.numpy().copy(),
    "read_only": _read_only,
    "dlpack": lambda t: OnlyDLPack(t.clone()),
    "requires_grad": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
    "parameter": lambda t: torch.nn.Parameter(t.clone()) if t.is_floating_point() else t,
}


@pytest.mark.parametrize("form", ["reference", "native"])
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize(("op", "path"), [*EVERY_ARRAY, STORED], ids=lambda v: v)
def test_foreign_arrays(op: str, path: str, kind: str, form: str) -> None:
    if (path, kind) == ("out", "read_only"):
        return  # refused: test_out_of_edge_scores
    torch.manual_seed(7)
    plain = valid_call_with(op, path)
    torch.manual_seed(7)
    args = valid_call_with(op, path)
    with pc.use(form):
        expected = getattr(pc.ops, op)(**plain)
        got = getattr(pc.ops, op)(**put(args, path, FOREIGN[kind](get(args, path))))
    assert same_values(got, expected)
    results = vars(got).values() if isinstance(got, pc.SparseFeatures) else (got,)
    assert not any(isinstance(t, Tensor) and t.requires_grad for t in results)


def test_out_is_written_through() -> None:
    args = valid_call("edge_scores")
    array = np.zeros((2, 5), np.float32)
    expected = pc.ops.edge_scores(**args)
    pc.ops.edge_scores(**{**args, "out": array})
    assert np.array_equal(array, expected.numpy())
    z = np.full((3, 2, 5), np.nan, np.float32)
    other = valid_call("attend_back")
    assert np.array_equal(pc.ops.attend_back(**{**other, "out": z}).numpy(), z)
    assert torch.equal(torch.from_numpy(z), pc.ops.attend_back(**other))


def test_broken_dlpack() -> None:
    refuses("encode", {**valid_call("encode"), "x": BrokenDLPack()}, "x", "got BrokenDLPack: cannot export", TypeError)
