"""The active features of all layers of a cross-layer transcoder, position by position, for one launch a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import SparseFeatures

UNIT = 16  # numbers by which places of decoder rows are counted: so many bytes are read at a time as their type allows


@dataclass(frozen=True, eq=False)
class CrossLayerFeatures:
    """Entries sorted by position, and there by layer: those of the layers up to any one come first.

    row_ptr: [positions + 1]; ends: [layers, positions], where the entries of the layers up to each end; place, value,
    column: [entries]. What an entry writes to layer `at` begins place + at * step units after w_dec[0] does.
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
    """The features of decoders [features, layers from its own on, width]; None where rows do not lie in units."""
    decoders = [w for w in w_dec if isinstance(w, Tensor)]
    if len(decoders) < len(features) or any(w.dtype != decoders[0].dtype or not w.is_contiguous() for w in decoders):
        return None
    width, first = decoders[0].shape[-1], decoders[0].data_ptr()
    apart = [divmod(w.data_ptr() - first, UNIT * w.itemsize) for w in decoders]
    if width % UNIT or first % (UNIT * decoders[0].itemsize) or any(rest for _, rest in apart):
        return None
    step, places = width // UNIT, []
    for layer, (w, found) in enumerate(zip(decoders, features, strict=True)):
        places.append(found.index * (w.shape[1] * step) + (apart[layer][0] - layer * step))
    counts = torch.stack([found.row_ptr.diff() for found in features])
    row_ptr = torch.cat([counts.new_zeros(1), counts.sum(0).cumsum(0)])
    column = torch.cat([found.position() for found in features]).argsort(stable=True)
    place, value = torch.cat(places)[column], torch.cat([found.value for found in features])[column]
    return CrossLayerFeatures(decoders, features, row_ptr, row_ptr[:-1] + counts.cumsum(0), place, value, column, step)
