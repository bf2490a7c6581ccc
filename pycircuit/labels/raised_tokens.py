"""Tokens that features raise, from the cache where they were computed before."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from pycircuit.model.replacement import ReplacementModel
from pycircuit.progress import Progress

from .label_cache import TOKENS, LabelCache, Raised, digests
from .output_tokens import BLOCK, OutputTokens

WORTH_CACHING = 1e9  # operations: less is done again sooner than a file is read
_ROWS = 256  # directions multiplied at a time
_RANDOM, _RANDOM_LAYER = 64, -1  # random directions, and the layer that stands for them


def raised_tokens(model: ReplacementModel, pairs: np.ndarray, progress: Progress) -> tuple[Raised, float]:
    """Tokens that features raise most, and the score above which they are raised clearly.

    pairs: [n, 2] int64, distinct layers and features, which the result has in ascending order. The score is the
    highest of random directions: a feature that does not exceed it raises nothing more than a vector without meaning.
    """
    outputs = OutputTokens(model, TOKENS)
    work = 2.0 * (len(pairs) + _RANDOM) * model.width * model.weights.vocabulary
    cache = LabelCache(model, outputs.count) if work >= WORTH_CACHING else None
    known = Raised.empty(outputs.count) if cache is None else cache.load()
    wanted = [(_RANDOM_LAYER, np.arange(_RANDOM))]
    wanted += [(int(layer), np.sort(pairs[pairs[:, 0] == layer, 1])) for layer in np.unique(pairs[:, 0])]
    result = Raised.empty(outputs.count)
    fresh = Raised.empty(outputs.count)
    progress.step("labels", 0, len(pairs), "features")
    for layer, features in wanted:
        vectors = _directions(outputs, layer, features)
        cached, missing = _split(known, layer, features, digests(vectors))
        computed = _computed(outputs, layer, features[missing], vectors[torch.from_numpy(missing)])
        fresh = fresh.joined(computed) if len(computed.layer) else fresh
        result = result.joined(cached).joined(computed)
        progress.step("labels", max(0, len(result.layer) - _RANDOM), len(pairs), "features")
    if cache is not None and len(fresh.layer):
        _store(cache, fresh, progress)
    random = result.layer == _RANDOM_LAYER
    return result.select(~random), float(result.score[random].max())


def _store(cache: LabelCache, fresh: Raised, progress: Progress) -> None:
    try:
        cache.add(fresh)
    except OSError as error:  # of a cache that cannot be written: the labels are complete without it
        progress.say(f"labels: not cached in {cache.path.parent}: {error.strerror or error}; set PYCIRCUIT_CACHE")


def _directions(outputs: OutputTokens, layer: int, features: np.ndarray) -> Tensor:
    """Directions of a layer's features, gathered a block at a time: [n, width]."""
    if layer == _RANDOM_LAYER:
        return outputs.random_directions(len(features))
    decoder = outputs.model.transcoders.w_dec[layer]
    step = max(1, BLOCK // max(1, prod(decoder.shape[1:])))
    return torch.cat([outputs.directions(layer, block) for block in torch.from_numpy(features).split(step)])


def _split(known: Raised, layer: int, features: np.ndarray, digest: np.ndarray) -> tuple[Raised, np.ndarray]:
    """Entries known for features of a layer, and the indices of the features without one."""
    own = known.select(known.layer == layer)
    place = np.searchsorted(own.feature, features).clip(max=max(0, len(own.feature) - 1))
    if not len(own.feature):
        return own, np.arange(len(features))
    hit = (own.feature[place] == features) & (own.digest[place] == digest)
    return own.select(place[hit]), np.flatnonzero(~hit)


def _computed(outputs: OutputTokens, layer: int, features: np.ndarray, vectors: Tensor) -> Raised:
    if not len(features):
        return Raised.empty(outputs.count)
    blocks = [outputs.raised(block) for block in vectors.split(_ROWS)]
    tokens, score = (torch.cat(column).numpy() for column in zip(*blocks, strict=True))
    return Raised(np.full(len(features), layer), features, digests(vectors), tokens, score)
