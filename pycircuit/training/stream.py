"""Activations of a model over a corpus, a bounded buffer at a time, shuffled, and the same again from any point.

What is in a buffer and in which order depends on the seed and on the buffer's number only, so a run that was
stopped needs none of it saved. Several processes share a buffer: each runs the model on its own sequences, and a
batch is the same tokens whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from pycircuit.model.families import Family
from pycircuit.model.transcoder_hooks import eager_transcoder_hooks
from pycircuit.model.weights import HasWeights, ModelWeights

from .recipe import Recipe

POSITIONS = 4096  # of sequences run together, padding included


@dataclass(frozen=True, eq=False)
class Source(HasWeights):
    """A model and where in it to look. Positions before `ignore` are never looked at."""

    model: Any
    family: Family
    weights: ModelWeights
    reads: str
    writes: str
    ignore: int

    def activations(self, sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What is read and written at the kept positions, one sequence after another: [layers, tokens, width] twice."""
        starts = torch.tensor([0, *(len(s) - self.ignore for s in sequences)]).cumsum(0).tolist()
        weights = self.weights
        shape = (len(weights.layers), starts[-1], weights.width)
        both = [torch.empty(shape, dtype=weights.dtype, device=weights.device) for _ in range(2)]
        for batch in batches([len(s) for s in sequences]):
            ids = torch.nn.utils.rnn.pad_sequence([sequences[i] for i in batch], batch_first=True).to(weights.device)

            def keep(into: Tensor, layer: int, found: Tensor, batch: Sequence[int] = batch) -> None:
                for place, i in enumerate(batch):
                    into[layer, starts[i] : starts[i + 1]] = found[place, self.ignore : len(sequences[i])]

            def read(layer: int, x: Tensor, keep: Any = keep) -> None:
                keep(both[0], layer, x)

            def write(layer: int, y: Tensor, keep: Any = keep) -> None:
                keep(both[1], layer, y)

            with eager_transcoder_hooks(self.model, self.family, weights, self.reads, self.writes, read, write):
                self.model.base_model(input_ids=ids, use_cache=False)
        return both[0], both[1]


def batches(lengths: Sequence[int], positions: int = POSITIONS) -> list[list[int]]:
    """Sequences of like length together, at most so many positions at a time (a single one may be longer)."""
    made: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not made or lengths[made[-1][0]] * (len(made[-1]) + 1) > positions:
            made.append([])
        made[-1].append(at)
    return made


@dataclass(eq=False)
class Buffer:
    """One shuffled stretch of the corpus; this process holds the tokens of its own sequences.

    x, y: [layers, held, width], normalised in place by whoever takes the buffer; row: [tokens], where a token of the
    buffer is held here, -1 for one that another process holds; order: [tokens].
    """

    x: Tensor
    y: Tensor
    row: Tensor
    order: Tensor

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """(rows of the batch held here, their places in the batch)."""
        rows = self.row[self.order[number * size : (number + 1) * size]]
        places = (rows >= 0).nonzero()[:, 0]
        return rows[places], places


class Stream:
    """The buffers of a run. sequences: token ids, each longer than the ignored positions."""

    def __init__(self, source: Source, sequences: list[Tensor], recipe: Recipe, rank: int = 0, world: int = 1) -> None:
        self.source, self.sequences, self.recipe = source, sequences, recipe
        self.rank, self.world = rank, world
        self.kept = [len(s) - source.ignore for s in sequences]
        # More than the corpus would only hold the same tokens twice.
        held = recipe.held(2 * source.depth * source.width * source.dtype.itemsize)
        self.size = min(held, max(recipe.batch, sum(self.kept)))

    def groups(self) -> Iterator[list[int]]:
        """Sequences of every buffer, without end: the corpus in another order each time through."""
        group, held = [], 0
        for epoch in count():
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            for i in torch.randperm(len(self.sequences), generator=generator).tolist():
                group.append(i)
                held += self.kept[i]
                if held >= self.size:
                    yield group
                    group, held = [], 0

    def batches_in(self, group: list[int]) -> int:
        return sum(self.kept[i] for i in group) // self.recipe.batch

    def buffer(self, number: int, group: list[int]) -> Buffer:
        """Run the model over this process's sequences of a group."""
        mine = group[self.rank :: self.world]
        x, y = self.source.activations([self.sequences[i] for i in mine])
        row, at, held = torch.full((sum(self.kept[i] for i in group),), -1), 0, 0
        for place, i in enumerate(group):
            if place % self.world == self.rank:
                row[at : at + self.kept[i]] = torch.arange(held, held + self.kept[i])
                held += self.kept[i]
            at += self.kept[i]
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + 500_009 * (number + 1))
        return Buffer(x, y, row.to(x.device), torch.randperm(len(row), generator=generator).to(x.device))
