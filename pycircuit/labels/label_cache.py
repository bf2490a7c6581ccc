"""Cache of the tokens that features raise: a file for each set of transcoders, in the package's cache folder."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from pycircuit.files.atomic import write_atomically
from pycircuit.files.cache_folder import cache_folder
from pycircuit.files.locks import exclusive
from pycircuit.files.safetensors import write_tensors
from pycircuit.model.replacement import ReplacementModel

TOKENS = 8  # of a feature
_VERSION = 1  # counts up when entries are made otherwise
_SAMPLED = 64  # rows of the unembedding in its digest


@dataclass(frozen=True, eq=False)
class Raised:
    """Tokens that features raise.

    layer, feature: [n]; digest: [n], of the vectors they were computed from; tokens: [n, TOKENS] ids, fewer where the
    vocabulary is smaller; score: [n].
    """

    layer: np.ndarray
    feature: np.ndarray
    digest: np.ndarray
    tokens: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.layer)

    @classmethod
    def empty(cls, tokens: int) -> Raised:
        none = np.zeros(0, np.int64)
        return cls(none, none, none, np.zeros((0, tokens), np.int64), np.zeros(0))

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(vars(self))

    def select(self, wanted: np.ndarray) -> Raised:
        return Raised(**{name: array[wanted] for name, array in self.arrays().items()})

    def joined(self, other: Raised) -> Raised:
        """These features and the others, whose entries replace those of one layer and feature."""
        new = other.arrays()
        both = Raised(**{name: np.concatenate([new[name], array]) for name, array in self.arrays().items()})
        _, first = np.unique(np.stack([both.layer, both.feature]), axis=1, return_index=True)
        return both.select(first)


def digests(directions: Tensor) -> np.ndarray:
    """Digests of rows, by their exact bits: [n] int64."""
    rows = directions.cpu().contiguous().view(torch.uint8).numpy()
    return np.array(
        [int.from_bytes(hashlib.blake2b(row.data, digest_size=8).digest(), "little", signed=True) for row in rows],
        np.int64,
    )


class LabelCache:
    """File of one set of transcoders of one model. An entry counts only for the very vector it was computed from."""

    def __init__(self, model: ReplacementModel, tokens: int) -> None:
        self.tokens = tokens
        self.path = cache_folder() / "labels" / f"{_set_digest(model)}.safetensors"

    def load(self) -> Raised:
        """Entries of the file; none if it is not there, or is damaged and has to be made anew."""
        with suppress(OSError, SafetensorError, ValueError, TypeError):
            entries = Raised(**load_file(self.path))
            count = len(entries.layer)
            shapes = {name: array.shape for name, array in entries.arrays().items()}
            expected = dict.fromkeys(shapes, (count,)) | {"tokens": (count, self.tokens)}
            if shapes == expected:
                return entries
        return Raised.empty(self.tokens)

    def add(self, entries: Raised) -> None:
        """Add entries to the file, those that other processes added meanwhile included."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path.with_name(f".{self.path.name}.lock")):
            joined = self.load().joined(entries)
            tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in joined.arrays().items()}
            write_atomically(self.path, lambda file: write_tensors(file, tensors))


def _set_digest(model: ReplacementModel) -> str:
    """Digest of a model's way from the stream to logits, and of its transcoders.

    Every row of the unembedding counts by their mean. Decoders are left out, as they may be left in files: entries
    have digests of their own.
    """
    weights, transcoders = model.weights, model.transcoders
    unembedding = weights.unembedding
    rows = torch.linspace(0, len(unembedding) - 1, _SAMPLED, device=unembedding.device).long()
    tensors = [weights.final_norm.gain, weights.unembedding_mean, unembedding[rows], *transcoders.b_enc]
    sha = hashlib.sha256(f"{_VERSION} {transcoders!r} {tuple(unembedding.shape)}".encode())
    for t in tensors:
        if t is not None:
            sha.update(f"{t.dtype}{list(t.shape)}".encode())
            sha.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:32]
