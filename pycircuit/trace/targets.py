"""Targets of a trace: output tokens, contrasts and directions of the output, or features, at any position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pycircuit.model.frozen import FrozenModel
from pycircuit.model.replacement import LocalReplacement, ReplacementModel
from pycircuit.ops import checks

from .contrast import Contrast, Side, contrast_label, direction


@dataclass(frozen=True)
class Feature:
    """One active feature of a prompt."""

    layer: int
    position: int
    feature: int

    def __post_init__(self) -> None:
        for name in ("layer", "position", "feature"):
            object.__setattr__(self, name, checks.whole_number("Feature", name, getattr(self, name), -(2**63)))


TargetLike: TypeAlias = int | str | tuple[str, float, Tensor] | Feature | Contrast
TargetList: TypeAlias = Sequence[TargetLike] | Tensor | np.ndarray | None


@dataclass(frozen=True, eq=False)
class Target:
    """A vector that reads the residual stream, whose edges a trace finds.

    token: its id, -1 of a direction, a contrast or a feature. layer: where it reads, the model's depth for the end of
    the stream; vector: [width], reads there; preactivation: the sum that edges and bias must have; product_norm: the
    norm of the products that it is the sum of. sides: the token ids of a contrast. probability: of a token that the
    caller names, whose weight is another number.
    """

    label: str
    token: int
    weight: float
    layer: int
    position: int
    vector: Tensor
    preactivation: float
    product_norm: float = 0.0
    sides: tuple[Side, Side] | None = None
    probability: float | None = None


def choose(
    model: ReplacementModel,
    local: LocalReplacement,
    targets: TargetList,
    position: int | Sequence[int],
    probability: float,
    max_targets: int,
) -> list[Target]:
    """Return the targets at every position; by default the likeliest tokens up to `probability`."""
    if isinstance(targets, Tensor | np.ndarray):
        targets = targets.flatten().tolist()
    if targets is not None and (isinstance(targets, str) or not isinstance(targets, Sequence)):
        raise TypeError(f"attribute: targets must be a list or None, got {type(targets).__name__}; put it in a list")
    chosen: list[Target] = []
    for output_position in positions_of(position, local.model.positions):
        if targets is None:
            chosen += _likeliest(model, local.model, output_position, probability, max_targets)
        else:
            chosen += [_output(model, local, t, output_position) for t in targets if not isinstance(t, Feature)]
    if targets is not None:
        chosen += [_feature(local, t) for t in targets if isinstance(t, Feature)]
    if not chosen:
        raise ValueError("attribute: targets must name at least one target, got none")
    _require_own_labels(chosen)
    return chosen


def _require_own_labels(targets: list[Target]) -> None:
    """Raise if a contrast shares its label, by which a graph finds its tokens, with another kind of target."""
    sides: dict[str, tuple[Side, Side] | None] = {}
    for target in targets:
        if target.token < 0 and sides.setdefault(target.label, target.sides) != target.sides:
            raise ValueError(f"attribute: targets must have labels of their own, got {target.label!r} of two kinds")


def positions_of(position: int | Sequence[int], count: int) -> list[int]:
    """Return positions of a prompt of `count` tokens, from 0 on; negative ones count from its end."""
    if isinstance(position, Tensor | np.ndarray | np.generic):
        position = position.tolist()
    if not isinstance(position, int | Sequence) or isinstance(position, str):
        raise TypeError(f"attribute: position must be an int or a list of them, got {type(position).__name__}")
    positions = [position] if isinstance(position, int) else list(position)
    if not positions:
        raise ValueError("attribute: position must name at least one position, got none")
    for p in positions:
        if not checks.is_int(p) or not -count <= p < count:
            raise ValueError(f"attribute: position must be from {-count} to {count - 1}, got {p!r}")
    return [int(p) % count for p in positions]


def _text(model: ReplacementModel, token: int) -> str:
    decode = getattr(model.tokenizer, "decode", None)
    return str(token) if decode is None else str(decode([token]))


def _probabilities(frozen: FrozenModel, position: int) -> Tensor:
    return frozen.logits(torch.tensor([position], device=frozen.device))[0].double().softmax(-1)


def _likeliest(
    model: ReplacementModel, frozen: FrozenModel, position: int, probability: float, max_targets: int
) -> list[Target]:
    likeliest = _probabilities(frozen, position).topk(min(max_targets, frozen.unembedding.shape[0]))
    count = int((likeliest.values.cumsum(0) < probability).sum()) + 1
    tokens, probabilities = likeliest.indices[:count].tolist(), likeliest.values[:count].tolist()
    return _tokens(model, frozen, tokens, position, probabilities)


def _outputs(
    frozen: FrozenModel, labels: list[str], tokens: list[int], weights: list[float], position: int, vectors: Tensor
) -> list[Target]:
    """Return targets at the end of the stream. vectors: [targets, width], their directions."""
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
    """Return targets of logits, each against the mean of all logits."""
    rows = torch.tensor(tokens, device=frozen.device)
    vectors = frozen.unembedding[rows].to(frozen.dtype) - frozen.unembedding_mean
    return _outputs(frozen, [_text(model, token) for token in tokens], tokens, weights, position, vectors)


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return ids of a text without the special tokens that the tokenizer puts around every prompt."""
    encoded, empty = tokenizer.encode(text), tokenizer.encode("")
    ids, empty_ids = ([int(t) for t in getattr(e, "ids", e)] for e in (encoded, empty))
    prefix = 0
    while prefix < min(len(ids), len(empty_ids)) and ids[prefix] == empty_ids[prefix]:
        prefix += 1
    return ids[prefix : len(ids) - (len(empty_ids) - prefix)]


def _output(model: ReplacementModel, local: LocalReplacement, target: object, position: int) -> Target:
    """Return the target of a token id, a token string or a direction, at one position."""
    if isinstance(target, str) or checks.is_int(target):
        return _token(model, local.model, _token_id(model, local.model, target), position)
    if isinstance(target, Contrast):
        return _contrast(model, local.model, target, position)
    if isinstance(target, tuple) and len(target) == 3 and isinstance(target[2], Tensor):
        return _direction(local.model, *target, position)
    known = "token ids, token strings, (label, weight, direction), pc.Contrast or pc.Feature"
    raise TypeError(f"attribute: targets must be {known}, got {target!r}")


def _token_id(model: ReplacementModel, frozen: FrozenModel, token: int | str) -> int:
    """Return the id of a token given as its id or its text."""
    if isinstance(token, str):
        ids = [] if model.tokenizer is None else _token_ids(model.tokenizer, token)
        if len(ids) != 1:
            raise ValueError(f"attribute: targets must be single tokens, got {token!r} ({len(ids)} of them)")
        token = ids[0]
    if not 0 <= token < frozen.unembedding.shape[0]:
        last = frozen.unembedding.shape[0] - 1
        raise ValueError(f"attribute: targets must be token ids from 0 to {last}, got {token}")
    return int(token)


def _token(model: ReplacementModel, frozen: FrozenModel, token: int, position: int) -> Target:
    probability = float(_probabilities(frozen, position)[token])
    return replace(_tokens(model, frozen, [token], position, [1.0])[0], probability=probability)


def _contrast(model: ReplacementModel, frozen: FrozenModel, target: Contrast, position: int) -> Target:
    sides = target.sides(lambda token: _token_id(model, frozen, token))
    first, second = ([_text(model, token) for token in side] for side in sides)
    vectors = direction(frozen.unembedding, sides)[None]
    return replace(_outputs(frozen, [contrast_label((first, second))], [-1], [1.0], position, vectors)[0], sides=sides)


def _direction(frozen: FrozenModel, label: str, weight: float, vector: Tensor, position: int) -> Target:
    if tuple(vector.shape) != (frozen.width,):
        raise ValueError(f"attribute: a direction must have shape [{frozen.width}], got {list(vector.shape)}")
    if not 0 <= float(weight) < inf:
        raise ValueError(f"attribute: a direction's weight must be finite and not negative, got {weight}")
    if not bool(vector.isfinite().all()):
        raise ValueError(f"attribute: a direction must be finite, got NaN or infinity in {str(label)!r}")
    vectors = vector.detach().to(frozen.device)[None]
    return _outputs(frozen, [str(label)], [-1], [float(weight)], position, vectors)[0]


def _feature(local: LocalReplacement, target: Feature) -> Target:
    """Return the target of an active feature: its encoder row, which reads at its layer and position."""
    depth, count = len(local.features), local.model.positions
    if not (0 <= target.layer < depth and 0 <= target.position < count):
        raise ValueError(f"attribute: {target} must have layer below {depth} and position below {count}")
    features = local.features[target.layer]
    begin, end = features.row_ptr[target.position : target.position + 2].tolist()
    matches = (features.index[begin:end] == target.feature).nonzero()
    if not len(matches):
        raise ValueError(f"attribute: {target} must be active on this prompt, got a silent one")
    bias = float(local.transcoders.b_enc[target.layer][target.feature])
    preactivation = float(features.value[begin + int(matches[0])]) - bias
    vector = local.transcoders.w_enc[target.layer][target.feature].to(local.model.dtype)
    label = f"layer {target.layer} feature {target.feature}"
    norm = product_norm(local, torch.tensor([target.layer]), torch.tensor([target.position]), vector[None])
    return Target(label, -1, 1.0, target.layer, target.position, vector, preactivation, float(norm[0]))


def product_norm(local: LocalReplacement, layer: Tensor, position: Tensor, vectors: Tensor) -> Tensor:
    """Return norms of the products of encoder rows and their input, whose sums are pre-activations: [rows] float64.

    layer, position: [rows]; vectors: [rows, width]. Zeros where the input was not recorded.
    """
    if local.reads is None:
        return torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    return (local.reads[layer, position].double() * vectors.double()).norm(dim=1)
