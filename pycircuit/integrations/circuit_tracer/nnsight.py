"""Replacement models of circuit-tracer's nnsight backend, frozen on one prompt by way of their transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pycircuit.model.hooks import Hooks
from pycircuit.model.replacement import LocalReplacement, ReplacementModel
from pycircuit.model.transcoder_hooks import read_batch
from pycircuit.ops import SparseFeatures

from .probe_cache import probe_once, wiring
from .transcoder_weights import ignored, own_features, transcoders_of, without_zeros

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # transformers scales embeddings in float32 at the most
_TOLERANCE_HALF = 2e-2


class _Prompt(ReplacementModel):
    """The transformers model of one prompt: probed once, with its own norms and circuit-tracer's features."""

    exact_norms = False

    def __init__(self, model: Any, ids: Tensor, state: tuple[Any, ...]) -> None:
        self.theirs, self.ids, self.state = model, ids, state
        super().__init__(model._module, transcoders_of(model), ignore_positions=ignored(model, len(ids)))
        self.weights = replace(self.weights, longest=0)  # rotary positions have no end, and circuit-tracer sets none

    def _probe(self) -> None:
        probe_once(self.hf_model, None, self.state, super()._probe)

    def _features(self, x: Tensor, lean: bool = False) -> tuple[SparseFeatures, ...]:
        if self.weights.stored == self.dtype:
            return tuple(map(without_zeros, super()._features(x, lean)))
        reads = read_batch(self.hf_model, self.family, self.weights, self.ids[None], self.transcoders.reads)
        return own_features(self.theirs, reads[:, 0].to(self.weights.stored), self.ignore_positions)


def frozen(model: Any, ids: Tensor) -> LocalReplacement:
    """Freeze a prompt on a model of this backend. ids: [positions]."""
    state = wiring(model._module, model._module.config)  # before any hook of pycircuit is on the modules
    with _without_wrappers(model._module) as hooks:
        prompt_model = _Prompt(model, ids, state)
        outputs: list[Tensor] = []
        embedding = prompt_model.hf_model.get_input_embeddings()
        hooks.after(embedding, lambda args, kwargs, out: outputs.append(out.detach()[0]))
        local = prompt_model.freeze(ids)
    local.errors[:, : local.ignore_positions] = 0  # as circuit-tracer does
    vectors = model.embed_weight.detach()[ids].to(local.model.dtype)
    return replace(local, model=_with_token_embeddings(local.model, outputs[0], vectors, prompt_model.weights.stored))


@contextmanager
def _without_wrappers(model: Any) -> Iterator[Hooks]:
    """Set the transformers model to evaluation mode and, in this thread, bypass nnsight's wrapper of each forward.

    The wrapper would apply changes inside a module, such as another attention function, that an nnsight trace made.
    """
    training = [module for module in model.modules() if module.training]
    try:
        with Hooks() as hooks:
            for module in model.modules():
                if {"__nnsight_forward__", "forward"} <= vars(module).keys():
                    hooks.replace_call(module, "forward", partial(type(module).forward, module))
            yield hooks
    finally:
        for module in training:
            module.training = True


def _with_token_embeddings(frozen_model: Any, output: Tensor, vectors: Tensor, stored: torch.dtype) -> Any:
    """Replace the token nodes by circuit-tracer's: rows of the embedding's weight, read at the embedding's output.

    Between that output and the first layer there is at most a factor. If the embedding itself scales its rows
    (Gemma 3), circuit-tracer's token nodes are not scaled, so its token edges are smaller than the law requires.
    """
    first, output = frozen_model.first_stream(), output.to(frozen_model.dtype)
    factor = float((first * output).sum() / output.square().sum())
    difference = float((first - factor * output).abs().max() / first.abs().max())
    if difference > _TOLERANCE.get(stored, _TOLERANCE_HALF):
        raise ValueError(
            "attribute: what enters the first layer must be the embedding's output, scaled or not, got something "
            f"{difference:.1g} off: circuit-tracer's token edges of this model cannot be reproduced"
        )
    vectors = vectors * factor
    remainder = first - vectors
    equal = float(remainder.abs().max() / first.abs().max()) <= _TOLERANCE.get(stored, _TOLERANCE_HALF)
    return frozen_model if equal else replace(frozen_model, embeddings=vectors, position_part=remainder)
