"""Texts, recipes and measures that the tests of training share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from builders import LAYERS, VOCABULARY

import pycircuit as pc
from pycircuit.model.capture import capture
from pycircuit.training import Recipe

RECIPE = Recipe(features=64, steps=60, k=6, start=12, batch=64, buffer=512, context=24, warmup=5, rate=3e-3, revive=20)


def corpus(count: int = 40, length: int = 24) -> torch.Tensor:
    """Texts with a pattern to learn: walks over the vocabulary in three step sizes."""
    g = torch.Generator().manual_seed(2)
    steps = torch.tensor([1, 2, 7])[torch.randint(0, 3, (count, length), generator=g)]
    return (steps.cumsum(1) + torch.randint(0, VOCABULARY, (count, 1), generator=g)) % VOCABULARY


def explained(t: Any, model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Explained share of variance by layer, from the model's streams and the saved transcoders, without the trainer."""
    replacement = pc.ReplacementModel(model, t)
    unexplained, variance = torch.zeros(2, LAYERS)
    for ids in sequences:
        frozen = replacement.freeze(ids)
        errors = frozen.errors[:, 1:]
        output = t.reconstruct(frozen.features, streams(replacement, ids, t.reads), 1)[:, 1:] + errors
        unexplained += errors.square().sum((1, 2))
        variance += output.square().sum((1, 2)) - output.sum(1).square().sum(1) / output.shape[1]
    return 1 - unexplained / variance


def streams(model: pc.ReplacementModel, ids: torch.Tensor, name: str) -> torch.Tensor:
    """Stream of this name of one prompt: [layers, positions, width]."""
    return capture(model.hf_model, model.family, model.weights, ids, (name,)).streams[name]


def tensors_of(t: Any) -> list[torch.Tensor]:
    """Weights of transcoders."""
    return [w for name in ("w_enc", "b_enc", "w_dec", "b_dec") for w in getattr(t, name)]


def assert_same(a: Any, b: Any) -> None:
    """Assert that two transcoders have the same bits."""
    for ours, theirs in zip(tensors_of(a), tensors_of(b), strict=True):
        assert torch.equal(ours, theirs)


def resumable(activation: str) -> Recipe:
    """Recipe of a run that is long enough to be killed, with revived features and several buffers."""
    return replace(RECIPE, kind="clt", activation=activation, steps=90, buffer=300, sparsity=3e-3)


SHARED_BY = ("topk", "jumprelu", "batchtopk")


def shared(activation: str) -> Recipe:
    """Recipe of a run that two processes share."""
    return replace(RECIPE, activation=activation, steps=24, revive=8, k=3, features=96, sparsity=1e-2)
