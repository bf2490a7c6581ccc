"""Shuffled activations of a model over a corpus, one bounded buffer at a time, reproducible from any point.

The content and the order of a buffer depend only on the seed and the buffer's number, so a stopped run saves none of
it. Several processes share a buffer: each runs the model on its own sequences, and a batch holds the same tokens
whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pycircuit.model.attention_choice import use_attention_function
from pycircuit.model.causal_attention import Windows, attend, attention_inputs
from pycircuit.model.families import Family
from pycircuit.model.transcoder_hooks import transcoder_hooks
from pycircuit.model.weights import HasWeights, ModelWeights
from pycircuit.ops.dispatch import multiplies_bfloat16
from pycircuit.ops.torch_settings import without_autocast
from pycircuit.transcoders.types import Reads, Writes

from .recipe import Recipe, RowPrecision

Report = Callable[[int, int], None]  # tokens done, all tokens
POSITIONS = 1024  # in one forward, padding included: an MLP's tensors then stay in the cache of most processors


def _silent(done: int, total: int) -> None:
    """Report nothing."""


class CausalAttention:
    """Attention of one forward over prompts padded on the right, by torch's own kernel where that has all it needs."""

    def __init__(self) -> None:
        self.windows = Windows()

    def attend(
        self, owner: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Output of every head: [prompts, positions, heads, width]. query: [prompts, heads, positions, width]."""
        window = self.windows.window(options["attention_mask"])
        layer = getattr(owner, "layer_idx", None) or 0
        dtype = torch.promote_types(query.dtype, torch.float32)  # of logits, which bfloat16 rounds by up to a quarter
        attention = attention_inputs(owner, layer, query, key, options, window, dtype)
        if window or attention.softcap or attention.sinks is not None:
            with without_autocast():
                heads = attend(attention, value.flatten(0, 1).to(dtype), None)
            out: Tensor = heads.unflatten(0, query.shape[:2]).to(query.dtype)
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=attention.scale)
        return out.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Source(HasWeights):
    """A model and the sites where transcoders read and write. Positions before `ignore` are left out.

    precision: of the forward's products; bfloat16 is that only where the hardware multiplies it.
    """

    model: Any
    family: Family
    weights: ModelWeights
    reads: Reads
    writes: Writes
    ignore: int
    precision: RowPrecision = "float32"

    def activations(self, sequences: Sequence[Tensor], report: Report = _silent) -> tuple[Tensor, Tensor]:
        """Activations (x, y) that transcoders read and reconstruct, sequences one after another.

        x, y: [layers, tokens, width], the ignored positions left out. report: called with tokens done and all tokens.
        """
        starts = torch.tensor([0, *(len(s) - self.ignore for s in sequences)]).cumsum(0).tolist()
        weights = self.weights
        shape = (len(weights.layers), starts[-1], weights.width)
        x, y = (torch.empty(shape, dtype=weights.dtype, device=weights.device) for _ in range(2))
        done = 0
        report(done, starts[-1])
        with torch.autocast(weights.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            for batch in batches([len(s) for s in sequences]):
                chosen = [sequences[i] for i in batch]
                ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True).to(weights.device)

                def copy(target: Tensor, layer: int, padded: Tensor, batch: Sequence[int] = batch) -> None:
                    for row, i in enumerate(batch):
                        target[layer, starts[i] : starts[i + 1]] = padded[row, self.ignore : len(sequences[i])]

                read, write = partial(copy, x), partial(copy, y)
                hooks = transcoder_hooks(self.model, self.family, weights, self.reads, self.writes, read, write)
                with hooks, use_attention_function(self.model, CausalAttention().attend):
                    self.model.base_model(input_ids=ids, use_cache=False)
                done += sum(starts[i + 1] - starts[i] for i in batch)
                report(done, starts[-1])
        return x, y

    @property
    def in_bfloat16(self) -> bool:
        """True where the forward's products are bfloat16."""
        return self.precision == "bfloat16" and (self.weights.device.type == "cuda" or multiplies_bfloat16())


def batches(lengths: Sequence[int], positions: int = POSITIONS) -> list[list[int]]:
    """Indices of sequences in batches of similar length, at most `positions` each; a longer sequence is alone."""
    result: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not result or lengths[result[-1][0]] * (len(result[-1]) + 1) > positions:
            result.append([])
        result[-1].append(index)
    return result


@dataclass(eq=False)
class Buffer:
    """Shuffled tokens of several sequences; each process has the activations of its own sequences.

    x, y: [layers, local tokens, width], which the trainer normalises in place; row: [tokens], each token's index into
    x and y, -1 if another process has it; order: [passes, tokens], permutations.
    """

    x: Tensor
    y: Tensor
    row: Tensor
    order: Tensor

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """(indices into x and y of the local tokens of a batch, their indices in the batch)."""
        turn, number = divmod(number, self.order.shape[1] // size)
        rows = self.row[self.order[turn, number * size : (number + 1) * size]]
        batch_index = (rows >= 0).nonzero()[:, 0]
        return rows[batch_index], batch_index


class Stream:
    """Buffers of a run. sequences: token ids, each longer than the ignored positions."""

    def __init__(self, source: Source, sequences: list[Tensor], recipe: Recipe, rank: int = 0, world: int = 1) -> None:
        self.source, self.sequences, self.recipe = source, sequences, recipe
        self.rank, self.world = rank, world
        self.tokens = [len(s) - source.ignore for s in sequences]  # of each sequence
        size = recipe.buffer_tokens(2 * source.depth * source.width * source.dtype.itemsize)
        if recipe.buffer is None:
            size -= size % recipe.batch  # tokens past the last full batch are in none
        self.size = min(size, max(recipe.batch, sum(self.tokens)))  # a larger one would hold a token twice

    def groups(self) -> Iterator[list[int]]:
        """Indices of the sequences of each buffer, without end: every epoch has another order."""
        group: list[int] = []
        tokens = 0
        for epoch in count():
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            for i in torch.randperm(len(self.sequences), generator=generator).tolist():
                group.append(i)
                tokens += self.tokens[i]
                if tokens >= self.size:
                    yield group
                    group, tokens = [], 0

    def batches_in(self, group: list[int]) -> int:
        """Number of full batches in all passes over a group's buffer."""
        return self.recipe.passes * (sum(self.tokens[i] for i in group) // self.recipe.batch)

    def buffer(self, number: int, group: list[int], report: Report = _silent) -> Buffer:
        """Run the model over this process's sequences of a group and return its buffer."""
        local = group[self.rank :: self.world]
        x, y = self.source.activations([self.sequences[i] for i in local], report)
        row = torch.full((sum(self.tokens[i] for i in group),), -1)
        offset, local_offset = 0, 0
        for number_in_group, i in enumerate(group):
            end = offset + self.tokens[i]
            if number_in_group % self.world == self.rank:
                row[offset:end] = torch.arange(local_offset, local_offset + self.tokens[i])
                local_offset += self.tokens[i]
            offset = end
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + 500_009 * (number + 1))
        order = torch.stack([torch.randperm(len(row), generator=generator) for _ in range(self.recipe.passes)])
        return Buffer(x, y, row.to(x.device), order.to(x.device))
