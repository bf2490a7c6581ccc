"""The weights in training: what they find, what they write, new rows for silent features, and what is saved."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.ops import Activation, BatchTopK, JumpReLU, ReLU, TopK
from pycircuit.transcoders import CrossLayerTranscoder, PerLayerTranscoders

from .recipe import PENALISED, Recipe
from .sparse import Entries, above, batch_top_k, decode, smallest, values

_ROUNDS = 64  # of drawing rows from tokens
_FRESH = 0.2  # a new row's norm, as a share of the others': heard at its token, silent at most others
_SMALL = 0.1  # norm of a decoder row at the start: one unit of variance is sqrt(width)


@dataclass(frozen=True, eq=False)
class Scale:
    """Activations are learned as (x - mean) / scale: mean square one. mean: [layers, width]; scale: [layers]."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, total: Tensor, square: Tensor, count: int) -> Scale:
        """From sums over `count` tokens: total [layers, width], square [layers]."""
        mean = total / count
        variance = (square / count - mean.square().sum(-1)) / total.shape[-1]
        return cls(mean, variance.clamp_min(1e-12).sqrt())

    def apply_(self, x: Tensor) -> None:
        x.sub_(self.mean[:, None]).div_(self.scale[:, None, None])


@dataclass(frozen=True, eq=False)
class Found:
    """What a forward gives: recon [layers, positions, width]; one entry a layer in the others."""

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
        if recipe.precision == "bfloat16" and dtype == torch.float64:
            raise TypeError("train: precision must be float32 where the model is float64, got bfloat16")
        self.read = torch.bfloat16 if recipe.precision == "bfloat16" else dtype
        generator = torch.Generator().manual_seed(recipe.seed)
        size = recipe.features

        def unit(*shape: int) -> Tensor:
            rows = torch.randn(*shape, width, generator=generator)
            return (rows / rows.norm(dim=-1, keepdim=True)).to(device, dtype)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.w_enc = [unit(size) for _ in range(depth)]
        self.w_dec = [_SMALL * unit(self.slots(layer), size) for layer in range(depth)]
        self.b_enc = [zeros(size) for _ in range(depth)]
        self.b_dec = zeros(depth, width)
        jumps, skips = recipe.activation == "jumprelu", recipe.skip
        self.log_theta = [zeros(size) for _ in range(depth)] if jumps else []
        self.w_skip = [zeros(width, width) for _ in range(depth)] if skips else []
        self.cutoff = [0.0] * depth
        for t in self.tensors().values():
            t.requires_grad_()

    def slots(self, layer: int) -> int:
        return 1 if self.recipe.kind == "plt" else self.depth - layer

    def tensors(self) -> dict[str, Tensor]:
        """Every leaf by a name, always in the same order."""
        lists = {n: getattr(self, n) for n in ("w_enc", "b_enc", "w_dec", "log_theta", "w_skip")}
        named = {f"{name}.{layer}": t for name, entries in lists.items() for layer, t in enumerate(entries)}
        return {**named, "b_dec": self.b_dec}

    @torch.no_grad()
    def open(self, x: Tensor) -> None:
        """Thresholds from the first batch, where `start` features a token pass them. x: [layers, positions, width]."""
        if self.recipe.activation not in PENALISED:
            return
        k = min(self.recipe.start, self.recipe.features)
        for layer in range(self.depth):
            own = ops.encode(x[layer], self.w_enc[layer], self.b_enc[layer], TopK(k))
            last = own.row_ptr[1:][own.row_ptr.diff() > 0] - 1
            smallest = torch.full_like(x[layer, :, 0], torch.inf).scatter_reduce_(0, own.position(), own.value, "amin")
            level = smallest[smallest.isfinite()].mean() if len(last) else torch.ones_like(smallest[0])
            if self.log_theta:
                self.log_theta[layer].fill_(float(level.log()))
            else:
                self.b_enc[layer].fill_(-float(level))

    @torch.no_grad()
    def sow(self, x: Tensor, y: Tensor) -> None:
        """Rows that read one token each and write what is written there. x, y: [layers, positions, width].

        The farther what is written lies from all drawn so far, the likelier a token is drawn, some of them at a time.
        """
        generator = torch.Generator().manual_seed(self.recipe.seed)
        for layer in range(self.depth):
            target = y[layer : layer + self.slots(layer)].transpose(0, 1).flatten(1)
            square = target.square().sum(1)
            far, drawn = square, []
            for some in torch.arange(self.recipe.features).tensor_split(min(self.recipe.features, _ROUNDS)):
                weight = far.double().cpu() + 1e-300  # something to choose from, if all of it is drawn
                at = torch.multinomial(weight, len(some), replacement=True, generator=generator).to(x.device)
                drawn.append(at)
                apart = square[:, None] + square[at] - 2 * (target @ target[at].T)
                far = torch.minimum(far, apart.min(1).values.clamp_min(0))
            at = torch.cat(drawn)
            length = x[layer, at].norm(dim=1).clamp_min(1e-6)[:, None]
            self.w_enc[layer].copy_(x[layer, at] / length)
            self.w_dec[layer].copy_(y[layer : layer + self.slots(layer), at] / length)

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor) -> None:
        """Scale what is written to each layer, so that it comes as near to y as it can."""
        recon = self.forward(x).recon
        scale = (recon * y).sum((1, 2)) / recon.square().sum((1, 2)).clamp_min(1e-12)
        for layer in range(self.depth):
            self.w_dec[layer].mul_(scale[layer : layer + self.slots(layer), None, None])

    def rule(self, layer: int) -> Activation:
        """The activation as it is saved."""
        kind = self.recipe.activation
        if kind == "topk":
            return TopK(self.recipe.k_at(layer))
        if kind == "batchtopk":
            return BatchTopK(self.cutoff[layer])
        return JumpReLU(self.log_theta[layer].detach().exp()) if kind == "jumprelu" else ReLU()

    @torch.no_grad()
    def _find(self, layer: int, x: Tensor, places: Tensor | None) -> Entries:
        w_enc, b_enc = self.w_enc[layer].detach().to(self.read), self.b_enc[layer].detach()
        if self.recipe.activation == "jumprelu":
            return above(x, w_enc, b_enc, self.log_theta[layer].detach().exp(), self.recipe.bandwidth)
        if self.recipe.activation != "batchtopk":
            return Entries.of(ops.encode(x, w_enc, b_enc, self.rule(layer)), self.recipe.features)
        count = self.recipe.k_at(layer) * (len(x) if places is None else self.recipe.batch)
        found = batch_top_k(x, w_enc, b_enc, count, 0.9 * self.cutoff[layer], places)
        least, before = smallest(found.pre, places), self.cutoff[layer]
        if isfinite(least):
            self.cutoff[layer] = least if before == 0 else 0.99 * before + 0.01 * least
        return found

    def forward(self, x: Tensor, places: Tensor | None = None) -> Found:
        """x: [layers, positions, width], normalised. places: as in `batch_top_k`."""
        parts: list[list[Tensor]] = [[] for _ in range(self.depth)]
        entries, found = [], []
        for layer, rows in enumerate(x.to(self.read).unbind(0)):
            here = self._find(layer, rows, places)
            theta = self.log_theta[layer].exp() if self.log_theta else None
            w_enc, w_dec = self.w_enc[layer].to(self.read), self.w_dec[layer].to(self.read)
            value = values(rows, w_enc, self.b_enc[layer], here, theta, self.recipe.bandwidth)
            written = decode(value, w_dec, here)
            for slot, part in enumerate(written.unbind(0)):
                parts[layer + slot].append(part)
            if self.w_skip:
                parts[layer].append(x[layer] @ self.w_skip[layer])
            entries.append(here)
            found.append(value)
        recon = [sum(part[1:], part[0]) + bias for part, bias in zip(parts, self.b_dec.unbind(0), strict=True)]
        return Found(torch.stack(recon), entries, found)

    def penalty(self, found: Found) -> Tensor:
        """Summed over layers and tokens: tanh(sharpness * |row| * value) for jumprelu, |row| * value for relu."""
        total = self.b_dec.new_zeros(())
        for layer, (entries, value) in enumerate(zip(found.entries, found.values, strict=True)):
            norm = self.w_dec[layer].square().sum((0, 2)).sqrt()
            written = norm[entries.index] * value
            jumps = self.recipe.activation == "jumprelu"
            total = total + (torch.tanh(self.recipe.sharpness * written) if jumps else written).sum()
        return total

    @torch.no_grad()
    def revive(self, layer: int, silent: Tensor, x: Tensor, error: Tensor, generator: torch.Generator) -> None:
        """New rows for `silent` features [n]: they read where the error is large, and write some of what is missing.

        x: [positions, width]; error: [slots, positions, width], target - reconstruction.
        """
        weight = error.double().square().sum((0, 2)).cpu() + 1e-300  # something to choose from, whatever the error
        at = torch.multinomial(weight, len(silent), replacement=True, generator=generator).to(x.device)
        rows, alive = x[at], self.w_enc[layer].norm(dim=1).mean()
        length = rows.norm(dim=1).clamp_min(1e-6)
        heard = _FRESH * alive * length
        if self.log_theta:
            heard = heard.maximum(1.5 * self.log_theta[layer][silent].exp())
        self.w_enc[layer][silent] = rows * (heard / length.square())[:, None]
        self.b_enc[layer][silent] = 0
        self.w_dec[layer][:, silent] = _FRESH * error[:, at] / heard[:, None]

    @torch.no_grad()
    def transcoders(self, x: Scale, y: Scale) -> PerLayerTranscoders | CrossLayerTranscoder:
        """In the model's own units: means and scales of what is read and written are folded into the weights."""
        made: dict[str, list[Tensor]] = {name: [] for name in ("w_enc", "b_enc", "w_dec", "b_dec", "w_skip")}
        rules = []
        for layer in range(self.depth):
            w_enc = self.w_enc[layer].detach() / x.scale[layer]
            b_enc = self.b_enc[layer].detach() - w_enc @ x.mean[layer]
            w_dec = self.w_dec[layer].detach() * y.scale[layer : layer + self.slots(layer), None, None]
            w_dec = w_dec.transpose(0, 1).contiguous()  # [F, slots, d]
            b_dec = self.b_dec[layer].detach() * y.scale[layer] + y.mean[layer]
            rule = self.rule(layer)
            if isinstance(rule, ReLU | JumpReLU):
                w_enc, b_enc, w_dec, rule = _unit_rows(w_enc, b_enc, w_dec, rule)
            if self.w_skip:
                w_skip = self.w_skip[layer].detach() * (y.scale[layer] / x.scale[layer])
                b_dec = b_dec - x.mean[layer] @ w_skip
                made["w_skip"].append(w_skip)
            made["w_enc"].append(w_enc)
            made["b_enc"].append(b_enc)
            made["w_dec"].append(w_dec[:, 0].contiguous() if self.recipe.kind == "plt" else w_dec)
            made["b_dec"].append(b_dec)
            rules.append(rule)
        kind = PerLayerTranscoders if self.recipe.kind == "plt" else CrossLayerTranscoder
        return kind(
            made["w_enc"], made["b_enc"], made["w_dec"], made["b_dec"], rules, made["w_skip"] or None,
            self.recipe.read, self.recipe.writes,
        )  # fmt: skip


def _unit_rows(
    w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, rule: ReLU | JumpReLU
) -> tuple[Tensor, Tensor, Tensor, Activation]:
    """A feature's decoder norm moved into its encoder, so that values compare. Only where no feature ranks another."""
    norm = w_dec.flatten(1).norm(dim=1)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    if isinstance(rule, JumpReLU):
        rule = JumpReLU(rule.theta * norm)
    return w_enc * norm[:, None], b_enc * norm, w_dec / norm[:, None, None], rule
