"""A model whose MLPs are replaced by transcoders: freeze one prompt, find its features and what they miss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycircuit.ops import SparseFeatures
from pycircuit.ops.checks import is_int, whole_number
from pycircuit.ops.threads import check_torch_threads
from pycircuit.ops.torch_settings import full_float32, without_autocast
from pycircuit.transcoders import Transcoders

from .capture import Captured, capture, disagreement, read_batch, relative, running
from .families import FamilyError, family_of
from .freed_memory import trim
from .frozen import FrozenModel
from .hooks import attention_by
from .weights import read_weights

PATTERN_BYTES = 1 << 30  # stored patterns of all layers together; above, they are recomputed
_BATCH_POSITIONS = 4096  # of prompts read together, padding included
_PROBE = ("resid_in", "attention_out", "resid_mid", "mlp_in", "mlp_raw", "mlp_out")
# (parts, logits): rounding of a few layers, with room. transformers runs parts of a float64 model in float32.
_TOLERANCE = {torch.float64: (1e-9, 1e-4), torch.float32: (1e-4, 1e-3)}
_TOLERANCE_HALF = (0.05, 0.25)  # two runs in half precision part further with every layer


@dataclass(frozen=True, eq=False)
class LocalReplacement:
    """One prompt, frozen, with features in place of MLPs. For every layer, in the space `transcoders.writes`:

    the MLP's output = decoded features + b_dec (both past the first ignore_positions) + skip + errors.

    features: one entry a layer, none where it has no transcoder; errors: [layers, positions, width]; reads: the same
    shape, what the transcoders read, None where nobody kept it.
    """

    model: FrozenModel
    transcoders: Transcoders
    features: tuple[SparseFeatures, ...]
    errors: Tensor
    ignore_positions: int
    reads: Tensor | None = None


class ReplacementModel:
    """A transformers causal model with transcoders. Weights are read now; after changing them, make a new one.

    tokenizer: needed for text; anything whose encode(text) gives ids. ignore_positions: opening positions that
    get no features; None takes the family's (1; 4 for Gemma-3 chat models). labels: what features stand for, by
    (layer, feature); graphs take theirs from here. The model is put in evaluation mode, and a short prompt is run at
    once to see that its family's row describes it.
    """

    exact_norms = True  # as `capture` takes it

    def __init__(
        self,
        hf_model: Any,
        transcoders: Transcoders,
        tokenizer: Any = None,
        ignore_positions: int | None = None,
        labels: dict[tuple[int, int], str] | None = None,
    ) -> None:
        check_torch_threads("ReplacementModel")
        self.family = family_of(hf_model)
        if not isinstance(transcoders, Transcoders):
            known = "pc.PerLayerTranscoders or pc.CrossLayerTranscoder"
            raise TypeError(f"ReplacementModel: transcoders must be {known}, got {type(transcoders).__name__}")
        if tokenizer is not None and not callable(getattr(tokenizer, "encode", None)):
            kind = type(tokenizer).__name__
            raise TypeError(f"ReplacementModel: tokenizer must have a method encode(text), got {kind}")
        if ignore_positions is not None:
            ignore_positions = whole_number("ReplacementModel", "ignore_positions", ignore_positions, 0)
        self.hf_model, self.tokenizer, self.transcoders = hf_model.eval(), tokenizer, transcoders
        self.labels = dict(labels or {})
        self.weights = read_weights(hf_model, self.family)
        transcoders.check(self)
        self.ignore_positions = self._ignored() if ignore_positions is None else ignore_positions
        self._probe()

    @property
    def running(self) -> Any:
        """A lock: threads run one forward of ours at a time and share the rest; an application's own need not wait."""
        return running(self.hf_model)

    @property
    def depth(self) -> int:
        return len(self.weights.layers)

    @property
    def width(self) -> int:
        return self.weights.width

    @property
    def dtype(self) -> torch.dtype:
        """float64 if the model is, else float32: half precision is widened."""
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def tokens(self, prompt: str | Sequence[int] | Tensor) -> Tensor:
        """Checked token ids of a prompt: [positions]."""
        ids = self._encoded(prompt)
        if not ids:
            raise ValueError("prompt must have at least one token, got none")
        if self.weights.longest and len(ids) > self.weights.longest:
            raise ValueError(f"prompt must have at most the model's {self.weights.longest} positions, got {len(ids)}")
        vocabulary = self.weights.vocabulary
        bad = next((i for i, t in enumerate(ids) if not 0 <= t < vocabulary), None)
        if bad is not None:
            raise ValueError(f"prompt must hold ids from 0 to {vocabulary - 1}, got {ids[bad]} at position {bad}")
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    @without_autocast()
    @full_float32()
    def freeze(
        self, prompt: str | Sequence[int] | Tensor, stored: bool | None = None, lean: bool = False
    ) -> LocalReplacement:
        """Run the prompt once. stored: keep attention patterns; None decides by their size.

        lean: give back what each layer of the forward, and its features, freed before the next one begins.
        """
        ids = self.tokens(prompt)
        reads, writes = self.transcoders.reads, self.transcoders.writes
        if stored is None:
            stored = self.stores_patterns(len(ids))
        with self.running:
            captured = capture(
                self.hf_model,
                self.family,
                self.weights,
                ids,
                (reads, writes),
                stored,
                exact_norms=self.exact_norms,
                lean=lean,
            )
        x, errors = captured.streams[reads], captured.streams[writes]  # becomes what the reconstruction misses
        features = self._features(x, lean)
        self.transcoders.add_to(errors, features, x, self.ignore_positions, sign=-1.0)
        return LocalReplacement(captured.model, self.transcoders, features, errors, self.ignore_positions, x)

    def stores_patterns(self, positions: int) -> bool:
        """Whether the attention patterns of all layers together are small enough to be kept."""
        heads = sum(layer.heads for layer in self.weights.layers)
        return heads * positions**2 * self.dtype.itemsize <= PATTERN_BYTES

    @without_autocast()
    def activations(self, prompts: Sequence[str | Sequence[int] | Tensor]) -> list[tuple[SparseFeatures, ...]]:
        """Active features of every prompt, one entry a layer; every prompt is checked before the first one runs."""
        if isinstance(prompts, str | Tensor):
            raise TypeError(f"activations: prompts must be a list of prompts, got one {type(prompts).__name__}")
        ids = [self.tokens(prompt) for prompt in prompts]
        found: list[tuple[SparseFeatures, ...]] = [()] * len(ids)
        for batch in self._batches([len(t) for t in ids]):
            with self.running:
                read = self._read([ids[i] for i in batch])
            for at, features in zip(batch, read, strict=True):
                found[at] = features
        return found

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Prompts of like length together; one by one where only a capture gives the model's exact arithmetic."""
        together = _BATCH_POSITIONS if self.weights.stored == torch.float32 else 0
        batches: list[list[int]] = []
        for at in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > together:
                batches.append([])
            batches[-1].append(at)
        return batches

    def _read(self, ids: list[Tensor]) -> list[tuple[SparseFeatures, ...]]:
        reads = self.transcoders.reads
        if len(ids) == 1:
            captured = capture(self.hf_model, self.family, self.weights, ids[0], (reads,), stored=False)
            return [self._features(captured.streams[reads])]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        x = read_batch(self.hf_model, self.family, self.weights, padded, reads)
        place = torch.arange(padded.shape[1], device=self.device)
        lengths = torch.tensor([len(t) for t in ids], device=self.device)
        kept = (place >= self.ignore_positions) & (place < lengths[:, None])
        layers = [
            _split(self.transcoders.encode(layer, x[layer][kept]), [len(t) for t in ids], self.ignore_positions)
            for layer in range(self.depth)
        ]
        return list(zip(*layers, strict=True))

    def _features(self, x: Tensor, lean: bool = False) -> tuple[SparseFeatures, ...]:
        features = []
        for layer in range(self.depth):
            features.append(self.transcoders.encode(layer, x[layer], self.ignore_positions))
            if lean:
                trim()
        return tuple(features)

    def _encoded(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt must be token ids, the model has no tokenizer, got text; pass tokenizer=")
            encoded = self.tokenizer.encode(prompt)
            return [int(t) for t in getattr(encoded, "ids", encoded)]
        if hasattr(prompt, "tolist"):
            prompt = prompt.tolist()
        if isinstance(prompt, list | tuple) and len(prompt) == 1 and isinstance(prompt[0], list | tuple):
            prompt = prompt[0]  # [1, positions], as tokenizers return it
        if not isinstance(prompt, list | tuple) or not all(map(is_int, prompt)):
            raise TypeError(f"prompt must be text or a list of token ids, got {type(prompt).__name__}")
        return list(map(int, prompt))

    def _ignored(self) -> int:
        name = str(getattr(self.hf_model.config, "_name_or_path", "")).rstrip("/")
        return self.family.chat_ignore_positions if name.endswith("-it") else 1

    @without_autocast()
    @full_float32()
    def _probe(self) -> None:
        """The law before anything else: a short prompt must come out of the frozen model as out of the model."""
        count = min(8, self.weights.vocabulary, self.weights.longest or 8)
        ids = torch.arange(count, device=self.device)
        half = self.weights.stored != self.dtype
        parts, logits = _TOLERANCE_HALF if half else _TOLERANCE[self.dtype]
        captured = capture(self.hf_model, self.family, self.weights, ids, _PROBE, settle=False)
        found = {name: (worst, parts) for name, worst in disagreement(captured).items()}
        found["logits"] = (self._logit_error(captured, ids), logits)
        if not captured.model.logits().isfinite().all():
            raise ValueError(
                f"ReplacementModel: model must give finite logits, got NaN or inf on a prompt of {count} tokens; look "
                "for NaN or inf in its weights"
            )
        wrong = [f"{name} {worst:.2g} off" for name, (worst, tolerance) in found.items() if not worst <= tolerance]
        if wrong:
            raise FamilyError(
                f"ReplacementModel: the row of {self.family.model_type!r} must reproduce the model, got "
                f"{', '.join(wrong)} on a prompt of {count} tokens; see help(pc.Family) for what each entry means"
            )

    def _logit_error(self, captured: Captured, ids: Tensor) -> float:
        with self.running, torch.no_grad(), attention_by(self.hf_model, "eager"):
            expected = self.hf_model(input_ids=ids[None], use_cache=False).logits[0]
        return relative(captured.model.logits(), expected.to(self.dtype))

    def __repr__(self) -> str:
        return f"ReplacementModel({self.family.model_type}, {self.transcoders!r}, {self.dtype}, {self.device})"


def check_model(op: str, model: Any) -> None:
    """That the first argument is one, and not the prompt, as circuit-tracer's `attribute` has it."""
    if not isinstance(model, ReplacementModel):
        raise TypeError(
            f"{op}: model must be a pc.ReplacementModel, got {type(model).__name__}; pc.load or "
            "pc.ReplacementModel(model, transcoders) makes one, and it comes before the prompt"
        )
    check_torch_threads(op)


def _split(found: SparseFeatures, lengths: list[int], ignore: int) -> list[SparseFeatures]:
    """Features of prompts one after another, without their ignored positions, back to one for each prompt."""
    parts, row = [], 0
    for length in lengths:
        empty = min(ignore, length)
        ptr = found.row_ptr[row : row + length - empty + 1]
        begin, end = int(ptr[0]), int(ptr[-1])
        row_ptr = torch.cat([ptr.new_zeros(empty), ptr - begin])
        parts.append(SparseFeatures(row_ptr, found.index[begin:end].clone(), found.value[begin:end].clone()))
        row += length - empty
    return parts
