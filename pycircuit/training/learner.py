"""Transcoder weights in training: initialisation, forward, penalty, revival, and export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, log

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.ops import Activation, BatchTopK, JumpReLU, ReLU, TopK
from pycircuit.transcoders import CrossLayerTranscoder, PerLayerTranscoders

from .massive import MassiveFeature
from .recipe import PENALISED, Recipe
from .sparse import Entries, above, batch_top_k, decode, smallest, values

_DRAWS = 64  # rounds in which rows are drawn from tokens
_REVIVED_NORM = 0.2  # as a share of the other rows' norm: active at its token, silent at most others
_RIDGE = 0.3  # of the variance of an input: of 0.03 to 1, explains most on another corpus after 6,079 tokens
_MASSIVE_VALUE = 100.0  # of the feature of massive outputs; other features stay below it
_INITIAL_NORM = 0.1  # of a decoder row: one unit of variance is sqrt(width)


@dataclass(frozen=True, eq=False)
class Scale:
    """Normalisation of activations: (x - mean) / scale. mean: [layers, width], or zero; scale: [layers].

    The scale is that of x less its mean, whether or not the mean is subtracted.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, total: Tensor, square: Tensor, count: int, centre: bool = True) -> Scale:
        """Scale from sums over `count` tokens. total: [layers, width]; square: [layers]."""
        mean = total / count
        variance = (square / count - mean.square().sum(-1)) / total.shape[-1]
        return cls(mean if centre else torch.zeros_like(mean), variance.clamp_min(1e-12).sqrt())

    def apply_(self, x: Tensor) -> None:
        """Normalise x [layers, positions, width] in place."""
        x.sub_(self.mean[:, None]).div_(self.scale[:, None, None])


@dataclass(frozen=True, eq=False)
class Forward:
    """Result of a forward. recon: [layers, positions, width]; entries and values: one item a layer."""

    recon: Tensor
    entries: list[Entries]
    values: list[Tensor]


class Learner:
    """Transcoders of every layer as leaf tensors, in normalised units.

    w_enc[l]: [F, d]; b_enc[l]: [F]; w_dec[l]: [slots, F, d], slot s writes to layer l + s; b_dec: [L, d];
    log_theta[l]: [F] (jumprelu); w_skip[l]: [d, d] (skip). cutoff[l]: the batch's threshold so far (batchtopk).
    """

    def __init__(self, recipe: Recipe, depth: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.recipe, self.depth, self.width = recipe, depth, width
        for name in ("precision", "forward"):
            if getattr(recipe, name) == "bfloat16" and dtype == torch.float64:
                raise TypeError(f"train: {name} must be float32 where the model is float64, got bfloat16")
        self.row_dtype = torch.bfloat16 if recipe.precision == "bfloat16" else dtype
        generator = torch.Generator().manual_seed(recipe.seed)
        size = recipe.features

        def unit(*shape: int) -> Tensor:
            rows = torch.randn(*shape, width, generator=generator)
            rows /= rows.norm(dim=-1, keepdim=True)
            return rows.to(device, dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.w_enc = [unit(size) for _ in range(depth)]
        self.w_dec = [_INITIAL_NORM * unit(self.slots(layer), size) for layer in range(depth)]
        self.b_enc = [zeros(size) for _ in range(depth)]
        self.b_dec = zeros(depth, width)
        self.log_theta = [zeros(size) for _ in range(depth)] if recipe.activation == "jumprelu" else []
        self.w_skip = [zeros(width, width) for _ in range(depth)] if recipe.skip else []
        self.cutoff = [0.0] * depth
        for t in self.tensors().values():
            t.requires_grad_()

    def slots(self, layer: int) -> int:
        """Number of layers that this layer's features write to."""
        return 1 if self.recipe.kind == "plt" else self.depth - layer

    def tensors(self) -> dict[str, Tensor]:
        """Every leaf by its name, always in the same order."""
        lists = {name: getattr(self, name) for name in ("w_enc", "b_enc", "w_dec", "log_theta", "w_skip")}
        named = {f"{name}.{layer}": t for name, tensors in lists.items() for layer, t in enumerate(tensors)}
        return {**named, "b_dec": self.b_dec}

    @torch.no_grad()
    def set_thresholds(self, x: Tensor) -> None:
        """Set thresholds so that `start` features a token pass them. x: [layers, positions, width], the first batch."""
        if self.recipe.activation not in PENALISED:
            return
        k = min(self.recipe.start, self.recipe.features)
        for layer in range(self.depth):
            features = ops.encode(x[layer], self.w_enc[layer], self.b_enc[layer], TopK(k))
            least = torch.full_like(x[layer, :, 0], torch.inf)
            least.scatter_reduce_(0, features.position(), features.value, "amin")
            threshold = least[least.isfinite()].mean() if features.count else torch.ones_like(least[0])
            if self.log_theta:
                self.log_theta[layer].fill_(float(threshold.log()))
            else:
                self.b_enc[layer].fill_(-float(threshold))

    @torch.no_grad()
    def rows_from_tokens(self, x: Tensor, y: Tensor, report: Callable[[int, int], None] | None = None) -> None:
        """Set rows that each read one token's x and write its y. x, y: [layers, positions, width].

        Tokens are drawn in rounds; the farther a token's y lies from those drawn so far, the likelier it is drawn.
        report: called with layers done and all layers.
        """
        generator = torch.Generator().manual_seed(self.recipe.seed)
        for layer in range(self.depth):
            if report:
                report(layer, self.depth)
            target = y[layer : layer + self.slots(layer)].transpose(0, 1).flatten(1)
            square = target.square().sum(1)
            distance = square  # squared, to the nearest token drawn so far
            drawn = []
            for features in torch.arange(self.recipe.features).tensor_split(min(self.recipe.features, _DRAWS)):
                weight = distance.double().cpu() + 1e-300  # positive even when every distance is zero
                tokens = torch.multinomial(weight, len(features), replacement=True, generator=generator).to(x.device)
                drawn.append(tokens)
                apart = square[:, None] + square[tokens] - 2 * (target @ target[tokens].T)
                distance = torch.minimum(distance, apart.min(1).values.clamp_min(0))
            tokens = torch.cat(drawn)
            length = x[layer, tokens].norm(dim=1).clamp_min(1e-6)[:, None]
            self.w_enc[layer].copy_(x[layer, tokens] / length)
            self.w_dec[layer].copy_(y[layer : layer + self.slots(layer), tokens] / length)

    @torch.no_grad()
    def skip_from_tokens(self, x: Tensor, y: Tensor) -> None:
        """Set the linear paths to ridge regressions of y on x. x, y: [layers, positions, width]."""
        for layer, w_skip in enumerate(self.w_skip):
            rows = x[layer].double()
            square = rows.T @ rows
            square.diagonal().add_(_RIDGE * square.diagonal().mean())
            w_skip.copy_(torch.linalg.solve(square, rows.T @ y[layer].double()))

    @torch.no_grad()
    def without_skip(self, x: Tensor, y: Tensor) -> Tensor:
        """Part of y that the linear paths leave to the features: [layers, positions, width]."""
        return y - torch.stack([x[i] @ w for i, w in enumerate(self.w_skip)]) if self.w_skip else y

    @torch.no_grad()
    def scale_decoders(self, x: Tensor, y: Tensor) -> None:
        """Scale the decoder rows of each target layer by the factor that brings the reconstruction nearest to y."""
        recon = self.without_skip(x, self.forward(x).recon)
        y = self.without_skip(x, y)
        scale = (recon * y).sum((1, 2)) / recon.square().sum((1, 2)).clamp_min(1e-12)
        for layer in range(self.depth):
            self.w_dec[layer].mul_(scale[layer : layer + self.slots(layer), None, None])

    @torch.no_grad()
    def set_massive(self, layer: int, feature: MassiveFeature, x: Scale, y: Scale) -> None:
        """Make the layer's first feature that of its massive outputs, of a value that no other feature has."""
        self.w_enc[layer][0] = _MASSIVE_VALUE * feature.w_enc * x.scale[layer]
        self.b_enc[layer][0] = _MASSIVE_VALUE * (feature.b_enc + feature.w_enc @ x.mean[layer])
        self.w_dec[layer][:, 0] = 0
        self.w_dec[layer][0, 0] = feature.w_dec / y.scale[layer] / _MASSIVE_VALUE
        if self.log_theta:
            self.log_theta[layer][0] = log(_MASSIVE_VALUE / 4)

    def activation(self, layer: int) -> Activation:
        """Activation of a layer as it is saved."""
        kind = self.recipe.activation
        if kind == "topk":
            return TopK(self.recipe.k_at(layer))
        if kind == "batchtopk":
            return BatchTopK(self.cutoff[layer])
        return JumpReLU(self.log_theta[layer].detach().exp()) if kind == "jumprelu" else ReLU()

    @torch.no_grad()
    def entries(self, layer: int, x: Tensor, batch_index: Tensor | None) -> Entries:
        """Entries whose values and gradients a step computes; batchtopk also moves its cutoff."""
        w_enc, b_enc = self.w_enc[layer].detach().to(self.row_dtype), self.b_enc[layer].detach()
        if self.recipe.activation == "jumprelu":
            return above(x, w_enc, b_enc, self.log_theta[layer].detach().exp(), self.recipe.bandwidth)
        if self.recipe.activation != "batchtopk":
            return Entries.of(ops.encode(x, w_enc, b_enc, self.activation(layer)), self.recipe.features)
        count = self.recipe.k_at(layer) * (len(x) if batch_index is None else self.recipe.batch)
        before = self.cutoff[layer]
        entries = batch_top_k(x, w_enc, b_enc, count, 0.9 * before, batch_index)
        least = smallest(entries.pre, batch_index)
        if isfinite(least):
            self.cutoff[layer] = least if before == 0 else 0.99 * before + 0.01 * least
        return entries

    def forward(self, x: Tensor, batch_index: Tensor | None = None) -> Forward:
        """Encode and reconstruct x [layers, positions, width], normalised. batch_index: as in `batch_top_k`."""
        writes: list[list[Tensor]] = [[] for _ in range(self.depth)]  # by the layer written to
        all_entries, all_values = [], []
        for layer, rows in enumerate(x.to(self.row_dtype).unbind(0)):
            entries = self.entries(layer, rows, batch_index)
            theta = self.log_theta[layer].exp() if self.log_theta else None
            w_enc, w_dec = self.w_enc[layer].to(self.row_dtype), self.w_dec[layer].to(self.row_dtype)
            value = values(rows, w_enc, self.b_enc[layer], entries, theta, self.recipe.bandwidth)
            for slot, written in enumerate(decode(value, w_dec, entries).unbind(0)):
                writes[layer + slot].append(written)
            if self.w_skip:
                writes[layer].append(x[layer] @ self.w_skip[layer])
            all_entries.append(entries)
            all_values.append(value)
        recon = [sum(terms[1:], terms[0]) + bias for terms, bias in zip(writes, self.b_dec.unbind(0), strict=True)]
        return Forward(torch.stack(recon), all_entries, all_values)

    def penalty(self, forward: Forward) -> Tensor:
        """Sum over layers and tokens of tanh(sharpness * |row| * value) for jumprelu, |row| * value for relu."""
        total = self.b_dec.new_zeros(())
        for layer, (entries, value) in enumerate(zip(forward.entries, forward.values, strict=True)):
            norm = self.w_dec[layer].square().sum((0, 2)).sqrt()
            written = norm[entries.index] * value
            jumps = self.recipe.activation == "jumprelu"
            total = total + (torch.tanh(self.recipe.sharpness * written) if jumps else written).sum()
        return total

    @torch.no_grad()
    def revive(self, layer: int, silent: Tensor, x: Tensor, error: Tensor, generator: torch.Generator) -> None:
        """Give `silent` features [n] new rows that read tokens of large error and write a share of that error.

        x: [positions, width]; error: [slots, positions, width], target - reconstruction.
        """
        weight = error.double().square().sum((0, 2)).cpu() + 1e-300  # positive even where the error is zero
        tokens = torch.multinomial(weight, len(silent), replacement=True, generator=generator).to(x.device)
        rows = x[tokens]
        usual_norm = self.w_enc[layer].norm(dim=1).mean()
        length = rows.norm(dim=1).clamp_min(1e-6)
        value = _REVIVED_NORM * usual_norm * length  # of the revived feature at its own token
        if self.log_theta:
            value = value.maximum(1.5 * self.log_theta[layer][silent].exp())
        self.w_enc[layer][silent] = rows * (value / length.square())[:, None]
        self.b_enc[layer][silent] = 0
        self.w_dec[layer][:, silent] = _REVIVED_NORM * error[:, tokens] / value[:, None]

    @torch.no_grad()
    def transcoders(self, x: Scale, y: Scale) -> PerLayerTranscoders | CrossLayerTranscoder:
        """Transcoders in the model's own units: x's and y's means and scales are folded into the weights."""
        weights: dict[str, list[Tensor]] = {name: [] for name in ("w_enc", "b_enc", "w_dec", "b_dec", "w_skip")}
        activations = []
        for layer in range(self.depth):
            w_enc = self.w_enc[layer].detach() / x.scale[layer]
            b_enc = self.b_enc[layer].detach() - w_enc @ x.mean[layer]
            w_dec = self.w_dec[layer].detach() * y.scale[layer : layer + self.slots(layer), None, None]
            w_dec = w_dec.transpose(0, 1).contiguous()  # [F, slots, d]
            b_dec = self.b_dec[layer].detach() * y.scale[layer] + y.mean[layer]
            activation = self.activation(layer)
            if isinstance(activation, ReLU | JumpReLU):
                w_enc, b_enc, w_dec, activation = _unit_rows(w_enc, b_enc, w_dec, activation)
            if self.w_skip:
                w_skip = self.w_skip[layer].detach() * (y.scale[layer] / x.scale[layer])
                b_dec = b_dec - x.mean[layer] @ w_skip
                weights["w_skip"].append(w_skip)
            weights["w_enc"].append(w_enc)
            weights["b_enc"].append(b_enc)
            weights["w_dec"].append(w_dec[:, 0].contiguous() if self.recipe.kind == "plt" else w_dec)
            weights["b_dec"].append(b_dec)
            activations.append(activation)
        kind = PerLayerTranscoders if self.recipe.kind == "plt" else CrossLayerTranscoder
        return kind(
            weights["w_enc"],
            weights["b_enc"],
            weights["w_dec"],
            weights["b_dec"],
            activations,
            weights["w_skip"] or None,
            self.recipe.read_site,
            self.recipe.writes,
        )


def _unit_rows(
    w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, activation: ReLU | JumpReLU
) -> tuple[Tensor, Tensor, Tensor, Activation]:
    """Move each feature's decoder norm into its encoder, so that values compare.

    Only for activations that look at one feature at a time: a top-k would choose others.
    """
    norm = w_dec.flatten(1).norm(dim=1)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    if isinstance(activation, JumpReLU):
        activation = JumpReLU(activation.theta * norm)
    return w_enc * norm[:, None], b_enc * norm, w_dec / norm[:, None, None], activation
