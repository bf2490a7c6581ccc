"""The five operations: each checks its arguments, chooses an implementation and records which one ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from . import arguments, checks
from .activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from .attention import Attention, RecomputedAttention, StoredAttention
from .dispatch import Explanation, ImplementationError, Ran, Request, last_run, plan, record, use
from .features import SparseFeatures
from .file_rows import FileRows
from .registry import OPS
from .torch_settings import autocast_is_on, without_autocast

__all__ = [
    "Activation",
    "Attention",
    "BatchTopK",
    "Explanation",
    "FileRows",
    "ImplementationError",
    "JumpReLU",
    "Prepared",
    "Ran",
    "ReLU",
    "RecomputedAttention",
    "SparseFeatures",
    "StoredAttention",
    "TopK",
    "attend_back",
    "decode",
    "edge_scores",
    "encode",
    "explain",
    "influence",
    "last_run",
    "prepare",
    "use",
]


def encode(x: Any, w_enc: Any, b_enc: Any, activation: Activation, ignore_positions: int = 0) -> SparseFeatures:
    """Active features of x; a matrix of positions x features is never written.

    x: [positions, width]; w_enc: [features, width], rows may be strided; b_enc: [features].
    The first `ignore_positions` positions get no features. Sums are float32, or float64 if all is float64.
    """
    features: SparseFeatures = _run("encode", *arguments.encode(x, w_enc, b_enc, activation, ignore_positions))
    return features


def decode(features: SparseFeatures, w_dec: Any, bias: Any = None) -> Tensor:
    """Decoded features: [positions, width], or [slots, positions, width].

    w_dec: [features, width] or [features, slots, width], rows may be strided; a FileRows is read from its file,
    the active rows only. bias: [width] or [slots, width].
    """
    decoded: Tensor = _run("decode", *arguments.decode(features, w_dec, bias))
    return decoded


def attend_back(y: Any, prefix_ptr: Any, attention: Attention, out: Any = None) -> Tensor:
    """Gradients sent back through frozen attention: [rows, kv_heads, width].

    z[j] = sum over i >= j of A[i, j] y[i], head by head, for every target. y: [rows, heads, width], the prefixes of all
    targets one after another; target t owns rows prefix_ptr[t] .. prefix_ptr[t + 1], its positions 0, 1, ... Heads that
    share a key are summed. out: the memory to write to, every element of it; without it every call allocates.
    """
    sent: Tensor = _run("attend_back", *arguments.attend_back(y, prefix_ptr, attention, out))
    return sent


def edge_scores(gradient: Any, prefix_ptr: Any, features: SparseFeatures, w_dec: Any, out: Any) -> Tensor:
    """Add the edges of targets from active features to out, in place, and return it: [targets, features.count].

    out[t, e] += value[e] * gradient[row of t at e's position] . w_dec[index[e]]. gradient: [rows, width], ragged as in
    attend_back. Entries at positions past a target's prefix stay as they are. w_dec: [features, width], read in place,
    or a FileRows.
    """
    scores: Tensor = _run("edge_scores", *arguments.edge_scores(gradient, prefix_ptr, features, w_dec, out))
    return scores


def influence(rows: Any, node: Any, weight: Any, order: Any = None) -> Tensor:
    """Influence of every column on the outputs: [columns], exact in one pass over a layered graph.

    rows: [count, columns] edges, outputs first, then from the highest layer down; node[r] is the column whose
    edges row r holds, -1 for an output; weight[r] is the influence that enters there (an output's probability).
    Each row's absolute values are normalised to sum to one.
    order: [count], the index of the r-th row, where rows are stored in another order; the result is that of
    rows[order], without the copy. node and weight follow it; rows that it does not name are never read.
    """
    result: Tensor = _run("influence", *arguments.influence(rows, node, weight, order))
    return result


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Name the implementation of `op` that these arguments would run, and why not the others; nothing is computed."""
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(OPS)}, got {op!r}")
    if not args and not kwargs:
        return plan(Request(op, "cpu", (torch.float32,)))
    return plan(_request(op, arguments.CHECKS[op](*args, **kwargs)))


@dataclass(frozen=True, eq=False)
class Prepared:
    """An op for many calls: its arguments are checked and its implementation is chosen. `prepare` makes one.

    A call names the arguments that differ. They are not checked: the caller makes them of the same types, on the same
    device, with shapes that fit the others. arguments: in the order of the op's parameters.
    """

    form: Callable[..., Any]
    ran: Ran
    arguments: dict[str, Any]

    def __call__(self, **changed: Any) -> Any:
        if autocast_is_on():
            with without_autocast():
                return self(**changed)
        result = self.form(*_gathered({**self.arguments, **changed}).values())
        record(self.ran)
        return result


def prepare(op: str, **arguments_of_op: Any) -> Prepared:
    """Check the arguments of an op and choose its implementation, for calls that differ in their rows only."""
    args = arguments.CHECKS[op](**arguments_of_op)
    explanation = plan(_request(op, args))
    form = OPS[op].form(explanation.implementation)
    return Prepared(form, Ran.of(explanation), dict(zip(OPS[op].parameters, args, strict=True)))


def _run(op: str, *args: Any) -> Any:
    if autocast_is_on():
        with without_autocast():
            return _run(op, *args)
    explanation = plan(_request(op, args))
    named = dict(zip(OPS[op].parameters, args, strict=True))
    result = OPS[op].form(explanation.implementation)(*_gathered(named).values())
    record(Ran.of(explanation))
    if op == "encode":
        _no_nan(result)
    return result


def _gathered(named: dict[str, Any]) -> dict[str, Any]:
    """Arguments with a decoder in a file replaced by the rows in use."""
    w_dec = named.get("w_dec")
    if not isinstance(w_dec, FileRows):
        return named
    features, rows = w_dec.gather(named["features"])
    return {**named, "features": features, "w_dec": rows}


def _request(op: str, args: tuple[Any, ...]) -> Request:
    """Device and float types of all tensors among the arguments, in their order."""
    device, dtypes = None, []
    for arg in args:
        if isinstance(arg, FileRows):
            dtypes.append(arg.dtype)
            continue
        for member in (arg,) if isinstance(arg, Tensor) else vars(arg).values() if is_dataclass(arg) else ():
            if isinstance(member, Tensor):
                device = device or member.device.type
                if member.is_floating_point():
                    dtypes.append(member.dtype)
    return Request(op, device or "cpu", tuple(dict.fromkeys(dtypes)))


def _any_nan(features: SparseFeatures, is_nan: Tensor) -> bool:
    """Tell if any value is NaN; on a GPU the same transfer brings the bounds that later checks of the features need."""
    if not features.count or is_nan.device.type == "cpu":
        return bool(is_nan.any())
    *ends, smallest, largest, wrong = torch.cat(
        [features.row_ptr, *(t[None] for t in features.index.aminmax()), is_nan.sum()[None]]
    ).tolist()
    checks.known_offsets(features.row_ptr, ends)
    checks.known_bounds(features.index, smallest, largest)
    return bool(wrong > 0)


def _no_nan(features: SparseFeatures) -> None:
    """Raise on a NaN pre-activation: it is active under every rule, so it is among the values."""
    is_nan = features.value.isnan()
    if _any_nan(features, is_nan):
        entry = int(is_nan.nonzero()[0])
        position, feature = int(features.position()[entry]), int(features.index[entry])
        raise ValueError(
            f"encode: pre-activations must not be NaN, got {int(is_nan.sum())} of them, the first at position "
            f"{position}, feature {feature}; look for NaN or inf in x, w_enc and b_enc"
        )
