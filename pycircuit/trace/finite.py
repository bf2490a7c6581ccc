"""NaN and infinity, found before they spread through a sweep and named by where they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pycircuit.model.replacement import LocalReplacement
from pycircuit.ops import FileRows, SparseFeatures

if TYPE_CHECKING:
    from .collect import Found


def check_active(local: LocalReplacement) -> None:
    """Refuse activations and written vectors that are NaN or infinite: ValueError with the weights they come from.

    An MLP's error is its output minus all that features, bias and skip write, so it is finite exactly if they are.
    """
    parts = [*(f.value for f in local.features), *local.errors]
    if bool(torch.stack([t.isfinite().all() for t in parts]).all()):
        return
    for layer, features in enumerate(local.features):
        wrong = (~features.value.isfinite()).nonzero()[:, 0]
        if len(wrong):
            feature, position = int(features.index[wrong[0]]), int(features.position()[wrong[0]])
            value = float(features.value[wrong[0]])
            got = f"{value} from the encoder row or bias of feature {feature}, at position {position}"
            _refuse(f"activations of layer {layer}", got, local)
    for layer, errors in enumerate(local.errors):
        if not bool(errors.isfinite().all()):
            _refuse(f"what is written to layer {layer}", f"NaN or infinity from {_writer(local, layer)}", local)


def _refuse(name: str, got: str, local: LocalReplacement) -> None:
    dtype = str(local.model.dtype).removeprefix("torch.")
    raise ValueError(f"attribute: {name} must be finite in {dtype}, got {got}; scale the weights or use float64")


def _writer(local: LocalReplacement, layer: int) -> str:
    """The weights that write NaN or infinity to a layer, in words."""
    transcoders, dtype = local.transcoders, local.model.dtype
    for source in transcoders.sources(layer):
        features = local.features[source]
        if features.count:
            largest = _largest(transcoders.decoder(source, layer), features, dtype)
            wrong = (~largest.isfinite()).nonzero()[:, 0]
            if len(wrong):
                return f"the decoder row of layer {source} feature {int(features.index[wrong[0]])}"
    for name, weights in (("b_dec", transcoders.bias(layer)), ("w_skip", transcoders.w_skip[layer])):
        if weights is not None and not bool(weights.to(dtype).isfinite().all()):
            return f"{name} of layer {layer}"
    return "the sum of its features, bias and skip"


def _largest(decoder: Tensor | FileRows, features: SparseFeatures, dtype: torch.dtype) -> Tensor:
    """The largest entry that each active feature writes: [active]."""
    used, row = features.index.unique(sorted=True, return_inverse=True)
    rows = decoder.gather(features)[1] if isinstance(decoder, FileRows) else decoder[used]
    return rows.to(dtype).abs().amax(1)[row] * features.value.abs()


def check_rows(found: Found, edges: Tensor, bias: Tensor) -> None:
    """Refuse a tile with an edge or a bias that is NaN or infinite: ValueError with its target and its source.

    edges: [rows, columns]; bias: [rows].
    """
    if bool(edges.sum().isfinite() & bias.sum().isfinite()):
        return
    rows = (~(edges.sum(1).isfinite() & bias.isfinite())).nonzero()[:, 0].tolist()
    for row in rows:
        wrong = (~edges[row].isfinite()).nonzero()[:, 0]
        if len(wrong):
            got = f"{float(edges[row, wrong[0]])} from {_source(found, int(wrong[0]))}"
        elif not bool(bias[row].isfinite()):
            got = f"{float(bias[row])} from the biases"
        else:
            continue  # finite numbers whose sum overflows
        _refuse(f"the edges to {_reader(found, found.store.count + row)}", got, found.local)


def _source(found: Found, column: int) -> str:
    columns = found.sweep.columns
    if column < columns.features:
        layer, position, feature = (int(t[column]) for t in (found.layer, found.position, found.index))
        return f"layer {layer} feature {feature} at position {position}"
    layer, position = divmod(column - columns.features, columns.positions)
    return f"the token at position {position}" if layer == columns.layers else f"layer {layer}'s error at {position}"


def _reader(found: Found, row: int) -> str:
    outputs = len(found.targets)
    if row < outputs:
        return f"target {found.targets[found.order[row]].label!r}"
    return _source(found, int(found.row_features()[row - outputs]))
