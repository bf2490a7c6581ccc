"""What is explained: output tokens, directions of the output, or features, at any position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from pycircuit.model.frozen import FrozenModel
from pycircuit.model.replacement import LocalReplacement, ReplacementModel
from pycircuit.ops import checks


@dataclass(frozen=True)
class Feature:
    """One active feature of a prompt."""

    layer: int
    position: int
    feature: int

    def __post_init__(self) -> None:
        for name in ("layer", "position", "feature"):
            object.__setattr__(self, name, checks.whole_number("Feature", name, getattr(self, name), -(2**63)))


@dataclass(frozen=True, eq=False)
class Target:
    """One row to trace. layer: where it reads, the model's depth for the end of the stream; vector: [width]
    reads there; preactivation: what edges and bias must add up to; product_norm: the norm of the products that it
    is the sum of; token: -1 for what is no token."""

    label: str
    token: int
    weight: float
    layer: int
    position: int
    vector: Tensor
    preactivation: float
    product_norm: float = 0.0


def check(max_features: Any, probability: Any, max_targets: Any, round_size: Any) -> tuple[int | None, int, int | None]:
    """max_features, max_targets and round_size as plain ints, as far as can be said before the model runs."""
    for name, value, least in (("max_features", max_features, 0), ("round_size", round_size, 1)):
        if value is None:
            continue
        if not checks.is_int(value):
            raise TypeError(f"attribute: {name} must be an int or None, got {type(value).__name__}")
        if value < least:
            rule = "not be negative" if not least else f"be at least {least}"
            raise ValueError(f"attribute: {name} must {rule}, got {value}")
    if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 < probability <= 1:
        raise ValueError(f"attribute: probability must be above 0 and at most 1, got {probability}")
    if not checks.is_int(max_targets) or max_targets < 1:
        raise ValueError(f"attribute: max_targets must be an int of at least 1, got {max_targets!r}")
    wanted, step = (None if value is None else int(value) for value in (max_features, round_size))
    return wanted, int(max_targets), step


def choose(
    model: ReplacementModel,
    local: LocalReplacement,
    targets: Any,
    position: int | Sequence[int],
    probability: float,
    max_targets: int,
) -> list[Target]:
    """The targets asked for at every position asked for; by default the likeliest tokens up to `probability`."""
    if hasattr(targets, "tolist"):
        targets = targets.flatten().tolist()  # ids, as a tensor or an array
    if targets is not None and (isinstance(targets, str) or not isinstance(targets, Sequence)):
        raise TypeError(f"attribute: targets must be a list or None, got {type(targets).__name__}; put it in a list")
    found: list[Target] = []
    for at in positions_of(position, local.model.positions):
        if targets is None:
            found += _likeliest(model, local.model, at, probability, max_targets)
        else:
            found += [_given(model, local, t, at) for t in targets if not isinstance(t, Feature)]
    if targets is not None:
        found += [_feature(local, t) for t in targets if isinstance(t, Feature)]
    if not found:
        raise ValueError("attribute: targets must name at least one target, got none")
    return found


def positions_of(position: int | Sequence[int], count: int) -> list[int]:
    if hasattr(position, "tolist"):
        position = position.tolist()  # positions, as a tensor or an array, or a number of either
    if not isinstance(position, int | Sequence) or isinstance(position, str):
        raise TypeError(f"attribute: position must be an int or a list of them, got {type(position).__name__}")
    given = [position] if isinstance(position, int) else list(position)
    if not given:
        raise ValueError("attribute: position must name at least one position, got none")
    for p in given:
        if not checks.is_int(p) or not -count <= p < count:
            raise ValueError(f"attribute: position must be from {-count} to {count - 1}, got {p!r}")
    return [int(p) % count for p in given]


def _text(model: ReplacementModel, token: int) -> str:
    decode = getattr(model.tokenizer, "decode", None)
    return str(token) if decode is None else str(decode([token]))


def _probabilities(frozen: FrozenModel, position: int) -> Tensor:
    return frozen.logits(torch.tensor([position], device=frozen.device))[0].double().softmax(-1)


def _likeliest(
    model: ReplacementModel, frozen: FrozenModel, position: int, probability: float, max_targets: int
) -> list[Target]:
    best = _probabilities(frozen, position).topk(min(max_targets, frozen.unembedding.shape[0]))
    enough = int((best.values.cumsum(0) < probability).sum()) + 1
    chosen, weights = best.indices[:enough].tolist(), best.values[:enough].tolist()
    return _tokens(model, frozen, chosen, position, weights)


def _outputs(
    frozen: FrozenModel, labels: list[str], tokens: list[int], weights: list[float], position: int, vectors: Tensor
) -> list[Target]:
    """Targets at the end of the stream; vectors: [targets, width], their directions."""
    products = frozen.final_norm.forward(frozen.final_stream)[position].double() * vectors.double()
    sums = torch.stack([products.abs().sum(1), products.sum(1), products.norm(dim=1)], 1).tolist()
    for label, (largest, _, _) in zip(labels, sums, strict=True):
        if not largest <= torch.finfo(frozen.dtype).max:
            dtype = str(frozen.dtype).removeprefix("torch.")
            raise ValueError(
                f"attribute: target {label!r} must have a direction whose product with the stream fits {dtype}, got "
                f"terms of {largest:g} together; scale it down"
            )
    return [
        Target(label, token, weight, len(frozen.layers), position, vector, total, norm)
        for label, token, weight, vector, (_, total, norm) in zip(
            labels, tokens, weights, vectors.to(frozen.dtype), sums, strict=True
        )
    ]


def _tokens(
    model: ReplacementModel, frozen: FrozenModel, tokens: list[int], position: int, weights: list[float]
) -> list[Target]:
    """Logits, against the mean of all logits."""
    rows = torch.tensor(tokens, device=frozen.device)
    vectors = frozen.unembedding[rows].to(frozen.dtype) - frozen.unembedding_mean
    return _outputs(frozen, [_text(model, token) for token in tokens], tokens, weights, position, vectors)


def _alone(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without what the tokenizer puts around every prompt, such as the opening token."""
    encoded, empty = tokenizer.encode(text), tokenizer.encode("")
    ids, around = ([int(t) for t in getattr(e, "ids", e)] for e in (encoded, empty))
    before = 0
    while before < min(len(ids), len(around)) and ids[before] == around[before]:
        before += 1
    return ids[before : len(ids) - (len(around) - before)]


def _given(model: ReplacementModel, local: LocalReplacement, target: Any, position: int) -> Target:
    frozen = local.model
    if isinstance(target, str):
        ids = [] if model.tokenizer is None else _alone(model.tokenizer, target)
        if len(ids) != 1:
            raise ValueError(f"attribute: targets must be single tokens, got {target!r} ({len(ids)} of them)")
        target = ids[0]
    if checks.is_int(target):
        target = int(target)
        if not 0 <= target < frozen.unembedding.shape[0]:
            last = frozen.unembedding.shape[0] - 1
            raise ValueError(f"attribute: targets must be token ids from 0 to {last}, got {target}")
        weight = float(_probabilities(frozen, position)[target])
        return _tokens(model, frozen, [target], position, [weight])[0]
    if isinstance(target, tuple) and len(target) == 3 and isinstance(target[2], Tensor):
        label, weight, vector = target
        if tuple(vector.shape) != (frozen.width,):
            raise ValueError(f"attribute: a direction must have shape [{frozen.width}], got {list(vector.shape)}")
        if not 0 <= float(weight) < inf:
            raise ValueError(f"attribute: a direction's weight must be finite and not negative, got {weight}")
        if not bool(vector.isfinite().all()):
            raise ValueError(f"attribute: a direction must be finite, got NaN or infinity in {str(label)!r}")
        vectors = vector.detach().to(frozen.device)[None]
        return _outputs(frozen, [str(label)], [-1], [float(weight)], position, vectors)[0]
    known = "token ids, token strings, (label, weight, direction) or pc.Feature"
    raise TypeError(f"attribute: targets must be {known}, got {target!r}")


def _feature(local: LocalReplacement, wanted: Feature) -> Target:
    depth, count = len(local.features), local.model.positions
    if not (0 <= wanted.layer < depth and 0 <= wanted.position < count):
        raise ValueError(f"attribute: {wanted} must have layer below {depth} and position below {count}")
    found = local.features[wanted.layer]
    begin, end = found.row_ptr[wanted.position : wanted.position + 2].tolist()
    at = (found.index[begin:end] == wanted.feature).nonzero()
    if not len(at):
        raise ValueError(f"attribute: {wanted} must be active on this prompt, got a silent one")
    value = float(found.value[begin + int(at[0])]) - float(local.transcoders.b_enc[wanted.layer][wanted.feature])
    vector = local.transcoders.w_enc[wanted.layer][wanted.feature].to(local.model.dtype)
    label = f"layer {wanted.layer} feature {wanted.feature}"
    place = torch.tensor([wanted.layer]), torch.tensor([wanted.position])
    norm = float(product_norm(local, *place, vector[None])[0])
    return Target(label, -1, 1.0, wanted.layer, wanted.position, vector, value, norm)


def product_norm(local: LocalReplacement, layer: Tensor, position: Tensor, vectors: Tensor) -> Tensor:
    """Norms of the products of encoder rows and their input, whose sums are pre-activations: [rows] float64.

    layer, position: [rows]; vectors: [rows, width]. Zeros where the input was not kept.
    """
    if local.reads is None:
        return torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    return (local.reads[layer, position].double() * vectors.double()).norm(dim=1)
