"""Transcoders trained in a minute: TopK, one a layer, plain Adam. Good enough for tests on real weights, no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pycircuit as pc

LAYERS, FEATURES, ACTIVE, STEPS, BATCH, RATE = 30, 1024, 32, 100, 256, 1e-3


@dataclass(frozen=True)
class Streams:
    """Inputs and outputs of the MLPs, opening positions left out: [layers, tokens, width] each."""

    read: Tensor
    written: Tensor

    def split(self, token: int) -> tuple[Streams, Streams]:
        return Streams(self.read[:, :token], self.written[:, :token]), Streams(
            self.read[:, token:], self.written[:, token:]
        )


def harvest(model: Any, windows: Tensor) -> Streams:
    """Run windows of text and return the MLPs' streams.

    windows: [windows, tokens].
    """
    read: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    written: list[list[Tensor]] = [[] for _ in range(LAYERS)]

    def record(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            read[layer].append(args[0][:, 1:].flatten(0, 1))
            written[layer].append(out[:, 1:].flatten(0, 1))

        return hook

    handles = [layer.mlp.register_forward_hook(record(i)) for i, layer in enumerate(model.model.layers)]
    try:
        with torch.no_grad():
            for batch in windows.split(4):
                model.base_model(batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Streams(*(torch.stack([torch.cat(batches) for batches in layers]) for layers in (read, written)))


def fit(streams: Streams) -> pc.PerLayerTranscoders:
    layers = [_fit_layer(x, y, i) for i, (x, y) in enumerate(zip(streams.read, streams.written, strict=True))]
    w_enc, b_enc, w_dec, b_dec = zip(*layers, strict=True)
    return pc.PerLayerTranscoders(w_enc, b_enc, w_dec, b_dec, activation=pc.TopK(ACTIVE))


def _fit_layer(x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, ...]:
    """One layer's w_enc, b_enc, w_dec and b_dec.

    Trained on centred streams of unit length; scales and means are folded in after.
    """
    g, width = torch.Generator().manual_seed(seed), x.shape[1]
    x_mean, y_mean = x.mean(0), y.mean(0)
    x_scale = (x - x_mean).square().mean().sqrt()
    y_scale = (y - y_mean).square().sum(1).mean().sqrt()
    w_enc = (torch.randn(FEATURES, width, generator=g) / width**0.5).requires_grad_()
    b_enc = torch.zeros(FEATURES, requires_grad=True)
    w_dec = torch.zeros(FEATURES, width, requires_grad=True)
    adam = torch.optim.Adam([w_enc, b_enc, w_dec], lr=RATE, betas=(0.9, 0.99))
    fade = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, 2 * (1 - step / STEPS)))
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=g)
        before = torch.addmm(b_enc, (x[rows] - x_mean) / x_scale, w_enc.T)
        value, index = before.topk(ACTIVE, -1)
        active = torch.zeros_like(before).scatter(1, index, value.relu())
        loss = (active @ w_dec - (y[rows] - y_mean) / y_scale).square().sum(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        fade.step()
    with torch.no_grad():
        folded = w_enc / x_scale
        return folded, b_enc - folded @ x_mean, w_dec * y_scale, y_mean


def explained(transcoders: pc.PerLayerTranscoders, streams: Streams) -> Tensor:
    """Share of the variance of what each MLP writes that its transcoder explains: [layers]; 0 is the mean's."""
    features = [transcoders.encode(layer, x) for layer, x in enumerate(streams.read)]
    missed = (streams.written - transcoders.reconstruct(features)).square().sum((1, 2))
    spread = (streams.written - streams.written.mean(1, keepdim=True)).square().sum((1, 2))
    return 1 - missed / spread
