"""Named inputs for every op, and their float64 results.

A case builds the checked arguments of one call, in the op's parameter order, from a seed. Tests walk this
table over every implementation and ISA; benchmarks check the same way before they time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import reference
from .activations import BatchTopK, JumpReLU, ReLU, TopK
from .attention import Attention, RecomputedAttention, StoredAttention
from .features import SparseFeatures

Case = Callable[[torch.Generator], tuple[Any, ...]]
TAILS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)  # vector widths plus and minus one
OUTPUTS_REUSED = {"edge_scores": 4}  # op -> position of the argument it adds to


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float32).to(dtype)


def misaligned(t: Tensor) -> Tensor:
    """Copy of t one element past an aligned address, rows one element apart."""
    buffer = torch.full((t.numel() // max(t.shape[-1], 1), t.shape[-1] + 1), 7.0, dtype=t.dtype)
    view = buffer.flatten()[1:].as_strided((buffer.shape[0], t.shape[-1]), (t.shape[-1] + 1, 1))
    view.copy_(t.reshape(-1, t.shape[-1]))
    return view.unflatten(0, t.shape[:-1])


def shifted(t: Tensor) -> Tensor:
    """Contiguous copy of t one element past an aligned address."""
    return torch.cat([t.new_full((1,), 7.0), t.flatten()])[1:].view(t.shape)


def sparse(g: torch.Generator, positions: int, size: int, active: int) -> SparseFeatures:
    """About `active` features a position, some positions with none."""
    mask = torch.rand(positions, size, generator=g) < active / size
    mask[:: 5 if positions > 1 else positions + 1] = False
    row_ptr = torch.zeros(positions + 1, dtype=torch.int64)
    row_ptr[1:] = mask.sum(1).cumsum(0)
    index = mask.nonzero()[:, 1].contiguous()
    return SparseFeatures(row_ptr, index, torch.rand(len(index), generator=g) + 0.5)


def one_each(g: torch.Generator, positions: int, size: int) -> SparseFeatures:
    """One feature at every position."""
    index = torch.randint(size, (positions,), generator=g)
    return SparseFeatures(torch.arange(positions + 1), index, torch.rand(positions, generator=g) + 0.5)


def prefixes(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def attention_weights(g: torch.Generator, heads: int, positions: int) -> Tensor:
    logits = normal(g, heads, positions, positions)
    above = torch.ones(positions, positions, dtype=torch.bool).triu(1)
    return logits.masked_fill(above, -torch.inf).softmax(-1)


def recomputed(
    g: torch.Generator, heads: int, groups: int, positions: int, width: int, **options: Any
) -> RecomputedAttention:
    """Q, K and the log-sum-exp that a forward pass with these options leaves behind."""
    query, key = normal(g, heads, positions, width), normal(g, groups, positions, width)
    draft = RecomputedAttention(query, key, torch.zeros(heads, positions), width**-0.5, **options)
    unnormalised = replace(draft, sinks=None).weights(positions)
    return replace(draft, log_sum_exp=unnormalised.sum(-1).log())


def _encode(positions: int, width: int, size: int, activation: Any, ignore: int = 0, **options: Any) -> Case:
    def build(g: torch.Generator) -> tuple[Any, ...]:
        w_enc = normal(g, size, width, dtype=options.get("dtype", torch.float32)) / max(width, 1) ** 0.5
        x, b_enc = normal(g, positions, width), normal(g, size) / 4
        if options.get("misaligned"):
            x, w_enc = misaligned(x), misaligned(w_enc)
        rule = activation(g, size) if callable(activation) else activation
        return x, w_enc, b_enc, rule, ignore

    return build


def _jump(g: torch.Generator, size: int) -> JumpReLU:
    return JumpReLU(1 + torch.rand(size, generator=g))


def _decode(positions: int, size: int, width: int, active: int, slots: int | None = None, **options: Any) -> Case:
    def build(g: torch.Generator) -> tuple[Any, ...]:
        shape = (size, width) if slots is None else (size, slots, width)
        w_dec = normal(g, *shape, dtype=options.get("dtype", torch.float32))
        bias = normal(g, *shape[1:]) if options.get("bias") else None
        return sparse(g, positions, size, active), misaligned(w_dec) if options.get("misaligned") else w_dec, bias

    return build


def _attend(lengths: tuple[int, ...], heads: int, groups: int, width: int, shift: bool = False, **options: Any) -> Case:
    def build(g: torch.Generator) -> tuple[Any, ...]:
        positions = max(lengths, default=1) + 2
        if options:
            chosen = {k: v for k, v in options.items() if k != "qk_width"}
            if chosen.pop("with_sinks", False):
                chosen["sinks"] = normal(g, heads)
            attention: Attention = recomputed(g, heads, groups, positions, options["qk_width"], **chosen)
        else:
            pattern = attention_weights(g, heads, positions)
            attention = StoredAttention(shifted(pattern) if shift else pattern, groups)
        y = normal(g, sum(lengths), heads, width)
        return shifted(y) if shift else y, prefixes(*lengths), attention, None

    return build


def _scores(lengths: tuple[int, ...], size: int, width: int, active: int, **options: Any) -> Case:
    def build(g: torch.Generator) -> tuple[Any, ...]:
        positions = max(lengths, default=1) + 1
        features = one_each(g, positions, size) if options.get("one_each") else sparse(g, positions, size, active)
        w_dec = normal(g, size, 3, width, dtype=options.get("dtype", torch.float32))[:, 1]  # one slot of three
        gradient = normal(g, sum(lengths), width)
        out = normal(g, len(lengths), features.count + 3)[:, 1:-2]  # added to, rows strided
        if options.get("misaligned"):
            gradient, w_dec = misaligned(gradient), misaligned(w_dec)
        return gradient, prefixes(*lengths), features, w_dec, out

    return build


def shuffled_rows(g: torch.Generator, rows: Tensor, spare: int = 5) -> tuple[Tensor, Tensor]:
    """Rows spread over a larger block of NaN, and the index of each."""
    buffer = torch.full((len(rows) + spare, rows.shape[1]), torch.nan)
    order = torch.randperm(len(buffer), generator=g)[: len(rows)]
    buffer[order] = rows
    return buffer, order


def influence_case(outputs: int, layers: int, per_layer: int, extra: int, **options: Any) -> Case:
    def build(g: torch.Generator) -> tuple[Any, ...]:
        # Columns: features by layer, then `extra` (errors, tokens). Rows: outputs, then layers from the top.
        columns, inner = layers * per_layer + extra, layers * per_layer
        falling = torch.arange(inner).view(layers, per_layer).flip(0).flatten()
        node = torch.cat([torch.full((outputs,), -1), falling])
        layer = torch.where(node >= 0, node // max(per_layer, 1), layers)
        rows = normal(g, len(node), columns)
        source = torch.arange(columns) // max(per_layer, 1)
        rows[:, :inner][source[:inner] >= layer[:, None]] = 0
        if options.get("silent"):
            rows[outputs::3] = 0  # rows with no edge at all
        weight = torch.zeros(len(node))
        weight[:outputs] = torch.rand(outputs, generator=g)
        rows, order = shuffled_rows(g, rows) if options.get("shuffled") else (rows, None)
        return misaligned(rows) if options.get("misaligned") else rows, node, weight, order

    return build


CASES: dict[str, dict[str, Case]] = {
    "encode": {
        "empty": _encode(0, 8, 16, ReLU()),
        "no_features": _encode(3, 8, 0, ReLU()),
        "one": _encode(1, 1, 1, JumpReLU(-9.0)),
        "relu": _encode(5, 24, 40, ReLU(), 1),
        "jumprelu": _encode(70, 33, 200, _jump, 1),
        "jumprelu_bf16": _encode(70, 40, 200, _jump, dtype=torch.bfloat16),
        "topk": _encode(37, 40, 300, TopK(7), 2),
        "topk_bf16": _encode(20, 64, 130, TopK(5), dtype=torch.bfloat16),
        "topk_all": _encode(4, 8, 6, TopK(99, keep_negative=True)),
        "topk_signed": _encode(6, 8, 12, TopK(9, keep_negative=True)),
        "batch_topk": _encode(19, 32, 100, BatchTopK(1.0)),
        "silent": _encode(9, 16, 64, JumpReLU(99.0)),
        "ignore_all": _encode(3, 16, 64, ReLU(), 3),
        "misaligned": _encode(18, 21, 50, _jump, misaligned=True),
        "long_width": _encode(9, 1100, 70, _jump),
        **{f"tail_{n}": _encode(n, n, n + 2, ReLU()) for n in TAILS},
    },
    "decode": {
        "empty": _decode(0, 8, 16, 2),
        "silent": _decode(4, 8, 16, 0, bias=True),
        "one": _decode(1, 1, 1, 1),
        "plain": _decode(23, 60, 40, 6, bias=True),
        "slots": _decode(23, 60, 40, 6, slots=5, bias=True),
        "slots_bf16": _decode(23, 60, 40, 6, slots=5, dtype=torch.bfloat16),
        "bf16": _decode(11, 30, 70, 6, bias=True, dtype=torch.bfloat16),
        "misaligned": _decode(11, 30, 37, 6, misaligned=True),
        "wide": _decode(7, 30, 2307, 4, slots=2),
        **{f"tail_{n}": _decode(n, n + 3, n, 2) for n in TAILS},
    },
    "attend_back": {
        "empty": _attend((), 2, 2, 8),
        "one": _attend((1,), 1, 1, 1),
        "stored": _attend((9, 40, 40, 70), 4, 4, 16),
        "grouped": _attend((5, 0, 33, 18), 6, 2, 8),
        "misaligned": _attend((5, 21, 18), 4, 2, 11, shift=True),
        "recomputed": _attend((9, 40, 70), 4, 4, 16, qk_width=16),
        "softcap": _attend((9, 40), 4, 2, 8, qk_width=12, softcap=2.0),
        "window": _attend((9, 40, 70), 2, 1, 8, qk_width=8, window=6),
        "sinks": _attend((9, 40), 4, 2, 8, qk_width=8, with_sinks=True),
        "all_options": _attend((70, 3, 130), 4, 2, 9, qk_width=7, softcap=3.0, window=33, with_sinks=True),
        **{f"tail_{n}": _attend((n, 2 * n), 2, 1, n) for n in TAILS},
        **{f"tail_recomputed_{n}": _attend((n, 2 * n), 2, 1, n, qk_width=n) for n in TAILS},
    },
    "edge_scores": {
        "empty": _scores((), 8, 8, 2),
        "no_features": _scores((3, 4), 8, 8, 0),
        "one": _scores((1,), 1, 1, 1),
        "ragged": _scores((3, 17, 0, 40, 9, 40), 64, 32, 9),
        "bf16": _scores((3, 17, 40), 64, 48, 9, dtype=torch.bfloat16),
        "misaligned": _scores((3, 17, 20), 30, 37, 6, misaligned=True),
        "many_targets": _scores(tuple(range(1, 60)), 40, 24, 5),
        "wide": _scores((9, 12), 30, 2307, 4),
        "one_each": _scores((3, 17, 0, 40), 64, 700, 1, one_each=True),
        "one_each_bf16": _scores((3, 17, 40), 64, 48, 1, one_each=True, dtype=torch.bfloat16),
        "one_each_misaligned": _scores((3, 17, 20), 30, 37, 1, one_each=True, misaligned=True),
        **{f"tail_{n}": _scores((n, n, n + 1), n + 3, n, 3) for n in TAILS},
    },
    "influence": {
        "empty": influence_case(0, 0, 0, 4),
        "one": influence_case(1, 0, 0, 1),
        "layers": influence_case(3, 4, 11, 9),
        "silent": influence_case(2, 3, 10, 5, silent=True),
        "misaligned": influence_case(2, 3, 10, 7, misaligned=True),
        "wide": influence_case(3, 5, 40, 5000),
        "ordered": influence_case(3, 4, 11, 9, shuffled=True),
        "ordered_misaligned": influence_case(2, 3, 10, 7, shuffled=True, misaligned=True),
        "ordered_wide": influence_case(3, 5, 40, 5000, shuffled=True),
        **{f"tail_{n}": influence_case(2, 3, n, n) for n in TAILS},
    },
}


def convert(argument: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Copy of an argument with `change` applied to every floating-point tensor in it."""
    if isinstance(argument, Tensor):
        return change(argument) if argument.is_floating_point() else argument
    if is_dataclass(argument) and not isinstance(argument, type):
        new = {f.name: convert(getattr(argument, f.name), change) for f in fields(argument) if f.init}
        return replace(argument, **new)
    return argument


def exact(op: str, args: tuple[Any, ...]) -> Any:
    """Result of the reference in float64 on copies of the arguments."""
    return getattr(reference, op)(*(convert(a, lambda t: t.double().clone()) for a in args))


def error(op: str, got: Any, truth: Any, args: tuple[Any, ...]) -> float:
    """Relative error |got - truth| / |truth|.

    Sparse results must agree on the active features, ties with a threshold aside. It is computed on the device of an
    encode's arguments, for the other ops on the CPU.
    """
    if op == "encode":
        return _encode_error(got, truth, args)
    got, truth = got.double().cpu(), truth.double().cpu()
    if got.shape != truth.shape:
        raise AssertionError(f"{op}: shape {list(got.shape)}, expected {list(truth.shape)}")
    size = float(truth.norm())
    return float((got - truth).norm()) / size if size else float(got.abs().sum())


def _encode_error(got: SparseFeatures, truth: SparseFeatures, args: tuple[Any, ...]) -> float:
    size, device = args[1].shape[0], args[0].device
    if int(got.row_ptr[-1]) != got.count or got.positions != truth.positions:
        raise AssertionError(f"encode: row_ptr {got.row_ptr.tolist()} does not fit {got.count} entries")
    key = got.position().cpu() * max(size, 1) + got.index.cpu()
    if bool((key.diff() <= 0).any()):
        raise AssertionError("encode: indices must ascend within a position")
    ours, theirs = (features.to(device).dense(size).double() for features in (got, truth))
    unequal = (ours != 0) != (theirs != 0)
    x, w_enc, b_enc, activation, ignored = (convert(a, lambda t: t.double()) for a in args)
    pre = torch.addmm(b_enc, x, w_enc.T)
    if unequal.any():  # they may differ only by rounding
        scale = (x.abs() @ w_enc.abs().T + b_enc.abs()) * 2.0**-20
        lifted = activation.active(pre + scale) != activation.active(pre - scale)
        lifted[:ignored] = False
        if bool((unequal & ~lifted).any()):
            raise AssertionError(f"encode: {int((unequal & ~lifted).sum())} features differ from float64")
        ours[unequal] = theirs[unequal] = 0
    norm = float(theirs.norm())
    return float((ours - theirs).norm()) / norm if norm else float(ours.abs().sum())
