"""A replacement model of circuit-tracer's nnsight backend, frozen on one prompt: it keeps the transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pycircuit.model.capture import read_batch
from pycircuit.model.hooks import Hooks
from pycircuit.model.replacement import LocalReplacement, ReplacementModel
from pycircuit.ops import SparseFeatures

from .probe_cache import once, wiring
from .transcoder_weights import ignored, own_features, transcoders_of, without_zeros

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # transformers scales embeddings in float32 at the most
_TOLERANCE_HALF = 2e-2


class _Prompt(ReplacementModel):
    """Their transformers model for one prompt: probed once, on its own norms, with the features that theirs finds."""

    exact_norms = False

    def __init__(self, model: Any, ids: Tensor, state: tuple[Any, ...]) -> None:
        self.theirs, self.ids, self.state = model, ids, state
        super().__init__(model._module, transcoders_of(model), ignore_positions=ignored(model, len(ids)))
        self.weights = replace(self.weights, longest=0)  # rotary positions have no end, and theirs asks for none

    def _probe(self) -> None:
        once(self.hf_model, None, self.state, super()._probe)

    def _features(self, x: Tensor, lean: bool = False) -> tuple[SparseFeatures, ...]:
        if self.weights.stored == self.dtype:
            return tuple(map(without_zeros, super()._features(x, lean)))
        reads = read_batch(self.hf_model, self.family, self.weights, self.ids[None], self.transcoders.reads)
        return own_features(self.theirs, reads[:, 0].to(self.weights.stored), self.ignore_positions)


def frozen(model: Any, ids: Tensor) -> LocalReplacement:
    """The prompt on their model. ids: [positions]."""
    state = wiring(model._module, model._module.config)  # before anything of ours is on the modules
    with _bare(model._module) as hooks:
        ours = _Prompt(model, ids, state)
        seen: list[Tensor] = []
        hooks.after(ours.hf_model.get_input_embeddings(), lambda args, kwargs, out: seen.append(out.detach()[0]))
        local = ours.freeze(ids)
    local.errors[:, : local.ignore_positions] = 0  # theirs drops them
    vectors = model.embed_weight.detach()[ids].to(local.model.dtype)
    return replace(local, model=_embedded(local.model, seen[0], vectors, ours.weights.stored))


@contextmanager
def _bare(model: Any) -> Iterator[Hooks]:
    """The transformers model in evaluation mode and, in this thread, without what nnsight puts around each forward:
    what a trace of its own asked for inside a module, such as another attention function, would answer in ours."""
    training = [m for m in model.modules() if m.training]
    try:
        with Hooks() as hooks:
            for m in model.modules():
                if {"__nnsight_forward__", "forward"} <= vars(m).keys():
                    hooks.instead(m, "forward", partial(type(m).forward, m))
            yield hooks
    finally:
        for module in training:
            module.training = True


def _embedded(frozen_model: Any, out: Tensor, vectors: Tensor, stored: torch.dtype) -> Any:
    """Token nodes as theirs: rows of the embedding's weight, read where the embedding's output is.

    What is done to that output on the way to the first layer is at the most a factor. Where the embedding itself
    scales its rows (Gemma 3), theirs is not scaled, and so its token edges are smaller than the law asks.
    """
    first, out = frozen_model.first_stream(), out.to(frozen_model.dtype)
    factor = float((first * out).sum() / out.square().sum())
    off = float((first - factor * out).abs().max() / first.abs().max())
    if off > _TOLERANCE.get(stored, _TOLERANCE_HALF):
        raise ValueError(
            "attribute: what enters the first layer must be the embedding's output, scaled or not, got something "
            f"{off:.1g} off: circuit-tracer's token edges of this model have no meaning that could be reproduced"
        )
    vectors = vectors * factor
    rest = first - vectors
    same = float(rest.abs().max() / first.abs().max()) <= _TOLERANCE.get(stored, _TOLERANCE_HALF)
    return frozen_model if same else replace(frozen_model, embeddings=vectors, position_part=rest)
