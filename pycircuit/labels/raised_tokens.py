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
RANDOM = 64  # random directions that features are compared with
_RANDOM_LAYER = -1  # stands for them
_FEATURES = 1 << 40  # more than a layer has
_BATCH = 4096  # features whose directions are in memory together
_ROWS = 256  # directions multiplied at a time


def raised_tokens(model: ReplacementModel, pairs: np.ndarray, progress: Progress) -> tuple[Raised, float]:
    """Tokens that features raise most, and the score above which they are raised clearly.

    pairs: [n, 2] int64, distinct layers and features, which the result has in ascending order. The score is the
    highest of random directions: a feature that does not exceed it raises nothing more than a vector without meaning.
    """
    outputs = OutputTokens(model, TOKENS)
    work = 2.0 * (len(pairs) + RANDOM) * model.width * model.weights.vocabulary
    cache = LabelCache(model, outputs.count) if work >= WORTH_CACHING else None
    known = Raised.empty(outputs.count) if cache is None else cache.load()
    random = np.stack([np.full(RANDOM, _RANDOM_LAYER), np.arange(RANDOM)], 1)
    wanted = np.unique(np.concatenate([random, pairs]), axis=0)
    result = fresh = Raised.empty(outputs.count)
    progress.step("labels", 0, len(wanted), "features")
    for begin in range(0, len(wanted), _BATCH):
        batch = wanted[begin : begin + _BATCH]
        vectors = _directions(outputs, batch)
        digest = np.zeros(len(batch), np.int64) if cache is None else digests(vectors)
        cached, missing = _split(known, batch, digest)
        computed = _computed(outputs, batch[missing], digest[missing], vectors, missing)
        fresh, result = fresh.joined(computed), result.joined(cached).joined(computed)
        progress.step("labels", len(result), len(wanted), "features")
    if cache is not None and len(fresh):
        _store(cache, fresh, progress)
    is_random = result.layer == _RANDOM_LAYER
    return result.select(~is_random), float(result.score[is_random].max())


def _store(cache: LabelCache, fresh: Raised, progress: Progress) -> None:
    try:
        cache.add(fresh)
    except OSError as error:  # of a cache that cannot be written: the labels are complete without it
        progress.say(f"labels: not cached in {cache.path.parent}: {error.strerror or error}; set PYCIRCUIT_CACHE")


def _directions(outputs: OutputTokens, pairs: np.ndarray) -> Tensor:
    """Directions of ascending layers and features: [n, width]."""
    vectors = []
    for layer in np.unique(pairs[:, 0]).tolist():
        features = torch.from_numpy(pairs[pairs[:, 0] == layer, 1])
        if layer == _RANDOM_LAYER:
            vectors.append(outputs.random_directions(RANDOM)[features])
            continue
        numbers = prod(outputs.model.transcoders.w_dec[layer].shape[1:])
        vectors += [outputs.directions(layer, block) for block in features.split(max(1, BLOCK // max(1, numbers)))]
    return torch.cat(vectors)


def _split(known: Raised, pairs: np.ndarray, digest: np.ndarray) -> tuple[Raised, np.ndarray]:
    """Entries known for layers and features, and the indices of those without one."""
    if not len(known):
        return known, np.arange(len(pairs))
    keys, wanted = (layer * _FEATURES + feature for layer, feature in ((known.layer, known.feature), pairs.T))
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    hit = (keys[place] == wanted) & (known.digest[place] == digest)
    return known.select(place[hit]), np.flatnonzero(~hit)


def _computed(
    outputs: OutputTokens, pairs: np.ndarray, digest: np.ndarray, vectors: Tensor, rows: np.ndarray
) -> Raised:
    """Entries of layers and features, computed from these rows of `vectors`."""
    if not len(pairs):
        return Raised.empty(outputs.count)
    chosen = vectors if len(rows) == len(vectors) else vectors[torch.from_numpy(rows).to(vectors.device)]
    blocks = [outputs.raised(block) for block in chosen.split(_ROWS)]
    tokens, score = (torch.cat(column) for column in zip(*blocks, strict=True))
    numbers = torch.cat([tokens.double(), score[:, None]], 1).cpu().numpy()  # one wait for a GPU
    return Raised(pairs[:, 0], pairs[:, 1], digest, numbers[:, :-1].astype(np.int64), numbers[:, -1])
