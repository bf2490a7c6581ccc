"""Evaluation on held-out text while a run goes on: the model's own activations are computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor

from pycircuit.model.attention_choice import use_attention_function
from pycircuit.model.transcoder_hooks import Read, Write, transcoder_hooks
from pycircuit.progress import Progress
from pycircuit.transcoders import Transcoders

from .evaluate import LOGITS, Reconstruction
from .sources import Texts
from .stream import CausalAttention, Source, batches

TOKENS = 2048  # of the held-out text, at most
_BYTES = 1 << 29  # of its activations, at most
_RISE = 1e-3  # of the mean explained variance: less does not count against patience


@dataclass(frozen=True)
class HeldOutPlan:
    """Held-out text of a run, and when to measure on it.

    every: steps between evaluations; None: a tenth of the run. patience: evaluations without a rise of the mean
    explained variance by 0.001 after which the run stops; None: it never stops early.
    """

    texts: Texts
    every: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "patience"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"train: {name} of held-out text must be at least 1, got {value!r}")

    def steps_between(self, steps: int) -> int:
        """Steps between evaluations of a run."""
        return self.every or max(1, steps // 10)

    def exhausted(self, variance: Tensor) -> bool:
        """Return True if the run is to stop. variance: [evaluations, layers]."""
        if self.patience is None or len(variance) <= self.patience:
            return False
        mean = variance.nanmean(1)
        return bool(mean[-self.patience :].max() < mean[: -self.patience].max() + _RISE)


class HeldOut:
    """Some held-out sequences with the model's activations and next tokens on them."""

    def __init__(self, source: Source, sequences: list[Tensor], show: Progress) -> None:
        self.source = source
        token_bytes = 2 * source.depth * source.width * source.dtype.itemsize
        self.sequences = _spread(sequences, source.ignore, min(TOKENS, max(1, _BYTES // token_bytes)))
        self.x, self.y = source.activations(self.sequences, partial(show.step, "held-out activations", unit="tokens"))
        self.spread = (self.y - self.y.mean(1, keepdim=True)).double().square().sum((1, 2))
        self.next_tokens = self._next_tokens(show, "held-out next tokens")

    @torch.no_grad()
    def measure(self, transcoders: Transcoders, show: Progress) -> Tensor:
        """Agreement on the next token, then the explained variance of every layer: [1 + layers] float64."""
        phase = "evaluating"
        show.step(phase, 0, len(self.sequences), "texts")
        features = [transcoders.encode(layer, x) for layer, x in enumerate(self.x)]
        error = self.y - transcoders.reconstruct(features, self.x)
        unexplained = (error - error.mean(1, keepdim=True)).double().square().sum((1, 2))
        replaced = self._next_tokens(show, phase, transcoders)
        agreed = (replaced == self.next_tokens).double().mean()
        return torch.cat([agreed[None], 1 - unexplained / self.spread]).cpu()

    @torch.no_grad()
    def _next_tokens(self, show: Progress, phase: str, transcoders: Transcoders | None = None) -> Tensor:
        """Likeliest next token at every place past the ignored positions, of the replacement model if transcoders."""
        source, device = self.source, self.source.weights.device
        read: Read = _read_nothing
        write: Write = _write_nothing
        tokens, done = [], count(1)
        for batch in batches([len(s) for s in self.sequences], max(1, LOGITS // source.weights.vocabulary)):
            sequences = [self.sequences[i] for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
            if transcoders is not None:
                reconstruction = Reconstruction(transcoders, source.ignore)
                read, write = reconstruction.read, reconstruction.write
            with (
                transcoder_hooks(source.model, source.family, source.weights, source.reads, source.writes, read, write),
                use_attention_function(source.model, CausalAttention().attend),
            ):
                best = source.model(input_ids=ids, use_cache=False).logits.argmax(-1)
            for row, sequence in enumerate(sequences):
                tokens.append(best[row, source.ignore : len(sequence)])
                show.step(phase, next(done), len(self.sequences), "texts")
        return torch.cat(tokens)


def _read_nothing(layer: int, x: Tensor) -> None:
    """Leave a layer's input alone."""


def _write_nothing(layer: int, y: Tensor) -> Tensor | None:
    """Leave a layer's output alone."""
    return None


def _spread(sequences: list[Tensor], ignore: int, tokens: int) -> list[Tensor]:
    """Sequences from all over the text, with about this number of tokens past the ignored ones, the last cut to fit."""
    generator = torch.Generator().manual_seed(0)
    chosen, left = [], tokens
    for i in torch.randperm(len(sequences), generator=generator).tolist():
        if left <= 0:
            break
        chosen.append(sequences[i][: ignore + left])
        left -= len(chosen[-1]) - ignore
    return chosen
