"""The active features of all layers of a cross-layer transcoder, position by position, for one launch a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import SparseFeatures

UNIT = 16  # elements that addresses of decoder rows are counted in, so that loads stay as wide as their type allows


@dataclass(frozen=True, eq=False)
class CrossLayerFeatures:
    """Active features of all layers, sorted by position and then by layer.

    row_ptr: [positions + 1]; ends: [layers, positions], the end of the entries of the layers up to each; place, value,
    column: [entries]. An entry's decoder row for a layer begins place + layer * step units after w_dec[0] does.
    """

    w_dec: Sequence[Tensor]
    features: Sequence[SparseFeatures]
    row_ptr: Tensor
    ends: Tensor
    place: Tensor
    value: Tensor
    column: Tensor
    step: int


def cross_layer_features(
    w_dec: Sequence[Tensor | None], features: Sequence[SparseFeatures]
) -> CrossLayerFeatures | None:
    """Features of decoders [features, layers from its own on, width]; None where rows are not aligned to units."""
    decoders = [w for w in w_dec if isinstance(w, Tensor)]
    if len(decoders) < len(features) or any(w.dtype != decoders[0].dtype or not w.is_contiguous() for w in decoders):
        return None
    width, first = decoders[0].shape[-1], decoders[0].data_ptr()
    distances = [divmod(w.data_ptr() - first, UNIT * w.itemsize) for w in decoders]
    if width % UNIT or first % (UNIT * decoders[0].itemsize) or any(remainder for _, remainder in distances):
        return None
    step, places = width // UNIT, []
    for layer, (w, active) in enumerate(zip(decoders, features, strict=True)):
        places.append(active.index * (w.shape[1] * step) + (distances[layer][0] - layer * step))
    counts = torch.stack([active.row_ptr.diff() for active in features])
    row_ptr = torch.cat([counts.new_zeros(1), counts.sum(0).cumsum(0)])
    column = torch.cat([active.position() for active in features]).argsort(stable=True)
    place, value = torch.cat(places)[column], torch.cat([active.value for active in features])[column]
    return CrossLayerFeatures(decoders, features, row_ptr, row_ptr[:-1] + counts.cumsum(0), place, value, column, step)
