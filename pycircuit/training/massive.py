"""Features of massive activations, in closed form from the opening positions.

Some layers write an output hundreds of times longer than usual at the opening position, always in one direction
(an attention sink), and now and then at a later one. One such output outweighs all others of a buffer, and no number
of steps makes a feature of it. The opening positions have an example in every text, so a ridge regression from the
layer's input finds them: about 1 at a massive output, about -1 at any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from .stream import Source

TEXTS = 64  # whose opening positions are read
_LEAST = 8  # massive outputs that a feature is fitted to
_RIDGE = 0.01  # of the mean variance of an input
_MARGIN = 0.1  # below zero, of the ordinary input nearest to a massive one


@dataclass(frozen=True, eq=False)
class MassiveFeature:
    """A feature that is about 1 at massive outputs and silent elsewhere, in the model's own units.

    w_enc, w_dec: [width]; b_enc: a number; norm: of an output, from which it counts as massive.
    """

    w_enc: Tensor
    b_enc: float
    w_dec: Tensor
    norm: float


def massive_feature(
    opening: tuple[Tensor, Tensor], ordinary: tuple[Tensor, Tensor], ratio: float
) -> MassiveFeature | None:
    """Feature of one layer's massive outputs; None if it has too few, or no plane parts their inputs from others.

    opening, ordinary: x and y [tokens, width] at the ignored positions and past them; ratio: of norms, a massive
    output's over the median's.
    """
    norms = ordinary[1].norm(dim=1)
    opening_norms = opening[1].norm(dim=1)
    massive = opening_norms > ratio * norms.median()
    if int(massive.sum()) < _LEAST:
        return None
    usual = norms <= ratio * norms.median() / 4
    x, others = opening[0][massive].double(), ordinary[0][usual].double()
    share = opening_norms[massive].double() / opening_norms[massive].double().mean()
    weight, offset = _ridge(x, others, share)
    highest = float((others @ weight + offset).max())
    if highest > -_MARGIN:
        offset -= highest + _MARGIN
    value = x @ weight + offset
    if float(value.min()) <= 0:
        return None
    y = opening[1][massive].double()
    w_dec = value @ y / value.square().sum()  # least squares
    dtype = ordinary[0].dtype
    return MassiveFeature(weight.to(dtype), offset, w_dec.to(dtype), float(opening_norms[massive].mean()) / 4)


def _ridge(massive: Tensor, others: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Weights and offset of a ridge regression: `target` at massive inputs, -1 at others, both weighed alike."""
    mean = (massive.mean(0) + others.mean(0)) / 2
    target_mean = (float(target.mean()) - 1) / 2
    a, b = massive - mean, others - mean
    covariance = (a.T @ a / len(a) + b.T @ b / len(b)) / 2
    correlation = (a.T @ (target - target_mean) / len(a) + b.mean(0) * (-1 - target_mean)) / 2
    covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean())
    weight = torch.linalg.solve(covariance, correlation)
    return weight, target_mean - float(mean @ weight)


def find_massive(
    source: Source, sequences: Sequence[Tensor], x: Tensor, y: Tensor, ratio: float, shared: bool
) -> dict[int, MassiveFeature]:
    """Features of massive outputs by layer, the same in all processes. x, y: [layers, tokens, width], a buffer."""
    features: dict[int, MassiveFeature] = {}
    if ratio and source.ignore and (not shared or dist.get_rank() == 0):
        opening = replace(source, ignore=0).activations([s[: source.ignore] for s in sequences[:TEXTS]])
        for layer in range(source.depth):
            feature = massive_feature((opening[0][layer], opening[1][layer]), (x[layer], y[layer]), ratio)
            if feature:
                features[layer] = feature
    if shared:
        objects = [features]
        dist.broadcast_object_list(objects, 0, device=source.device)
        features = objects[0]
    return features


def replace_massive(x: Tensor, y: Tensor, norms: Sequence[float]) -> None:
    """Replace tokens of massive outputs by ordinary ones, in place.

    x, y: [layers, tokens, width]; norms: by layer, from which an output is massive.
    """
    for layer, norm in enumerate(norms):
        if norm == torch.inf:
            continue
        massive = y[layer].norm(dim=1) > norm
        rows, usual = massive.nonzero()[:, 0], (~massive).nonzero()[:, 0]
        if len(rows) and len(usual):
            usual = usual[torch.arange(len(rows), device=usual.device) % len(usual)]
            x[layer, rows], y[layer, rows] = x[layer, usual], y[layer, usual]
