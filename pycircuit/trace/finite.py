"""Checks for NaN and infinity, with errors that name the weights they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pycircuit.model.replacement import LocalReplacement
from pycircuit.ops import FileRows, SparseFeatures

if TYPE_CHECKING:
    from .collect import RowCollector


def check_active(local: LocalReplacement) -> None:
    """Refuse activations and written vectors that are NaN or infinite: ValueError with the weights they come from.

    An MLP's error is its output minus all that features, bias and skip write, so it is finite exactly if they are.
    """
    tensors = [*(f.value for f in local.features), *local.errors]
    if bool(torch.stack([t.sum() for t in tensors]).isfinite().all()):  # a sum is NaN or infinite if a number is
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
    """Return the words for the weights that write NaN or infinity to a layer."""
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
    """Return the largest entry that each active feature writes: [active]."""
    used, row = features.index.unique(sorted=True, return_inverse=True)
    rows = decoder.gather(features)[1] if isinstance(decoder, FileRows) else decoder[used]
    return rows.to(dtype).abs().amax(1)[row] * features.value.abs()


def check_rows(collector: RowCollector, edges: Tensor, bias: Tensor) -> None:
    """Refuse a tile with an edge or a bias that is NaN or infinite: ValueError with its target and its source.

    edges: [rows, columns]; bias: [rows].
    """
    if bool(edges.sum().isfinite() & bias.sum().isfinite()):
        return
    rows = (~(edges.sum(1).isfinite() & bias.isfinite())).nonzero()[:, 0].tolist()
    for row in rows:
        wrong = (~edges[row].isfinite()).nonzero()[:, 0]
        if len(wrong):
            got = f"{float(edges[row, wrong[0]])} from {_source(collector, int(wrong[0]))}"
        elif not bool(bias[row].isfinite()):
            got = f"{float(bias[row])} from the biases"
        else:
            continue  # finite numbers whose sum overflows
        _refuse(f"the edges to {_reader(collector, collector.store.count + row)}", got, collector.local)


def _source(collector: RowCollector, column: int) -> str:
    columns = collector.sweep.columns
    if column < columns.features:
        layer, position, feature = (int(t[column]) for t in (collector.layer, collector.position, collector.index))
        return f"layer {layer} feature {feature} at position {position}"
    layer, position = divmod(column - columns.features, columns.positions)
    return f"the token at position {position}" if layer == columns.layers else f"layer {layer}'s error at {position}"


def _reader(collector: RowCollector, row: int) -> str:
    outputs = len(collector.targets)
    if row < outputs:
        return f"target {collector.targets[collector.order[row]].label!r}"
    return _source(collector, int(collector.row_features()[row - outputs]))
