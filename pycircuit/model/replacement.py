"""A model whose MLPs are replaced by transcoders: one prompt frozen, its features and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from pycircuit.ops import SparseFeatures
from pycircuit.ops.checks import whole
from pycircuit.ops.threads import check_torch_threads
from pycircuit.ops.torch_settings import full_float32, without_autocast
from pycircuit.transcoders import Transcoders

from .agreement import disagreement, relative_error
from .attention_choice import use_attention
from .capture import Captured, capture
from .families import FamilyError, family_of
from .forward_lock import Lock, forward_lock
from .freed_memory import trim
from .frozen import FrozenModel
from .prompts import Prompt, Tokenizer, is_one_prompt, prompt_ids, prompt_list
from .transcoder_hooks import read_batch
from .weights import HasWeights, read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATTERN_BYTES = 1 << 30  # stored patterns of all layers together; above, they are recomputed
_BATCH_POSITIONS = 4096  # positions of prompts read together, padding included
_PROBE = ("resid_in", "attention_out", "resid_mid", "mlp_in", "mlp_raw", "mlp_out")
# (steps, logits): well above the rounding of a few layers. transformers computes norms of float64 models in float32.
_TOLERANCE = {torch.float64: (1e-9, 1e-4), torch.float32: (1e-4, 1e-3)}
_TOLERANCE_HALF = (0.05, 0.25)  # two runs in half precision part further with every layer


@dataclass(frozen=True, eq=False)
class LocalReplacement:
    """One prompt, frozen, with features in place of MLPs.

    For every layer, in the space `transcoders.writes`: the MLP's output = decoded features + b_dec (both past the
    first ignore_positions) + skip + errors.

    features: one entry a layer, none where it has no transcoder; errors: [layers, positions, width]; reads: the
    transcoders' inputs, [layers, positions, width], or None where they were not kept.
    """

    model: FrozenModel
    transcoders: Transcoders
    features: tuple[SparseFeatures, ...]
    errors: Tensor
    ignore_positions: int
    reads: Tensor | None = None


class ReplacementModel(HasWeights):
    """A transformers causal model with transcoders.

    Weights are read now; after changing them, make a new one.

    tokenizer: needed for text; anything whose encode(text) gives ids. ignore_positions: opening positions that
    get no features; None takes the family's (1; 4 for Gemma-3 chat models). labels: the features' meanings, by
    (layer, feature), which graphs show. The model is put in evaluation mode, and a short prompt is run at once to see
    that its family's row describes it.
    """

    exact_norms = True  # the argument of `capture`

    def __init__(
        self,
        hf_model: PreTrainedModel,
        transcoders: Transcoders,
        tokenizer: Tokenizer | None = None,
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
            ignore_positions = whole("ReplacementModel", "ignore_positions", ignore_positions, 0)
        self.hf_model: Any = hf_model.eval()
        self.tokenizer: Any = tokenizer
        self.transcoders = transcoders
        self.labels = dict(labels or {})
        self.weights = read_weights(hf_model, self.family)
        transcoders.check(self)
        self.ignore_positions = self._family_ignore_positions() if ignore_positions is None else ignore_positions
        self._probe()

    @property
    def forward_lock(self) -> Lock:
        """The lock by which threads run one forward of ours at a time; an application's own forwards need not wait."""
        return forward_lock(self.hf_model)

    def to(self, *device_or_dtype: torch.device | torch.dtype | str | int) -> ReplacementModel:
        """Move model and transcoders to another device or float type, in place as torch's modules do; return self."""
        transcoders = self.transcoders.to(*device_or_dtype)
        with self.forward_lock:
            self.hf_model.to(*device_or_dtype)
            self.transcoders = transcoders
            self.weights = read_weights(self.hf_model, self.family)
            transcoders.check(self)
            self._probe()
        return self

    def tokens(self, prompt: Prompt) -> Tensor:
        """Checked token ids of a prompt: [positions]."""
        ids = prompt_ids(prompt, self.tokenizer)
        if not ids:
            raise ValueError("prompt must have at least one token, got none")
        if self.weights.longest and len(ids) > self.weights.longest:
            raise ValueError(f"prompt must have at most the model's {self.weights.longest} positions, got {len(ids)}")
        vocabulary = self.weights.vocabulary
        unknown = next((i for i, token in enumerate(ids) if not 0 <= token < vocabulary), None)
        if unknown is not None:
            raise ValueError(
                f"prompt must hold ids from 0 to {vocabulary - 1}, got {ids[unknown]} at position {unknown}"
            )
        return torch.tensor(ids, dtype=torch.int64, device=self.device)

    @without_autocast()
    @full_float32()
    def freeze(self, prompt: Prompt, stored: bool | None = None, lean: bool = False) -> LocalReplacement:
        """Run the prompt once.

        stored: keep attention patterns; None decides by their size.

        lean: give back what each layer of the forward, and its features, freed before the next one begins.
        """
        ids = self.tokens(prompt)
        reads, writes = self.transcoders.reads, self.transcoders.writes
        if stored is None:
            stored = self.stores_patterns(len(ids))
        with self.forward_lock:
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
        x = captured.streams[reads]
        errors = captured.streams[writes]  # until the reconstruction is subtracted
        features = self._features(x, lean)
        self.transcoders.add_to(errors, features, x, self.ignore_positions, sign=-1.0)
        return LocalReplacement(captured.model, self.transcoders, features, errors, self.ignore_positions, x)

    def stores_patterns(self, positions: int) -> bool:
        """True where the attention patterns of all layers together are small enough to be kept."""
        heads = sum(layer.heads for layer in self.weights.layers)
        return heads * positions**2 * self.dtype.itemsize <= PATTERN_BYTES

    @overload
    def activations(self, prompts: Prompt) -> tuple[SparseFeatures, ...]: ...  # type: ignore[overload-overlap]
    @overload
    def activations(self, prompts: Sequence[Prompt]) -> list[tuple[SparseFeatures, ...]]: ...
    @without_autocast()
    def activations(
        self, prompts: Prompt | Sequence[Prompt]
    ) -> tuple[SparseFeatures, ...] | list[tuple[SparseFeatures, ...]]:
        """Active features of a prompt, one entry a layer, or a list of them for a list of prompts.

        Every prompt is checked before the first one runs.
        """
        ids = [self.tokens(prompt) for prompt in prompt_list("activations", prompts)]
        result: list[tuple[SparseFeatures, ...]] = [()] * len(ids)
        for batch in self._batches([len(tokens) for tokens in ids]):
            with self.forward_lock:
                active = self._read([ids[i] for i in batch])
            for i, features in zip(batch, active, strict=True):
                result[i] = features
        return result[0] if is_one_prompt(prompts) else result

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Prompts of like length together; one by one where only a capture gives the model's exact arithmetic."""
        limit = _BATCH_POSITIONS if self.weights.stored == torch.float32 else 0
        batches: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > limit:
                batches.append([])
            batches[-1].append(i)
        return batches

    def _read(self, ids: list[Tensor]) -> list[tuple[SparseFeatures, ...]]:
        reads = self.transcoders.reads
        if len(ids) == 1:
            captured = capture(self.hf_model, self.family, self.weights, ids[0], (reads,), stored=False)
            return [self._features(captured.streams[reads])]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        x = read_batch(self.hf_model, self.family, self.weights, padded, reads)
        position = torch.arange(padded.shape[1], device=self.device)
        lengths = [len(tokens) for tokens in ids]
        has_features = position >= self.ignore_positions
        has_features = has_features & (position < torch.tensor(lengths, device=self.device)[:, None])
        layers = [
            _split(self.transcoders.encode(layer, x[layer][has_features]), lengths, self.ignore_positions)
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

    def _family_ignore_positions(self) -> int:
        name = str(getattr(self.hf_model.config, "_name_or_path", "")).rstrip("/")
        return self.family.chat_ignore_positions if name.endswith("-it") else 1

    @without_autocast()
    @full_float32()
    def _probe(self) -> None:
        """Require that a short prompt comes out of the frozen model as it comes out of the model."""
        count = min(8, self.weights.vocabulary, self.weights.longest or 8)
        ids = torch.arange(count, device=self.device)
        half = self.weights.stored != self.dtype
        step_tolerance, logit_tolerance = _TOLERANCE_HALF if half else _TOLERANCE[self.dtype]
        captured = capture(self.hf_model, self.family, self.weights, ids, _PROBE, settle=False)
        errors = {name: (worst, step_tolerance) for name, worst in disagreement(captured).items()}
        errors["logits"] = (self._logit_error(captured, ids), logit_tolerance)
        if not captured.model.logits().isfinite().all():
            raise ValueError(
                f"ReplacementModel: model must give finite logits, got NaN or inf on a prompt of {count} tokens; look "
                "for NaN or inf in its weights"
            )
        wrong = [f"{name} {worst:.2g} off" for name, (worst, tolerance) in errors.items() if not worst <= tolerance]
        if wrong:
            raise FamilyError(
                f"ReplacementModel: the row of {self.family.model_type!r} must reproduce the model, got "
                f"{', '.join(wrong)} on a prompt of {count} tokens; see help(pc.Family) for what each entry means"
            )

    def _logit_error(self, captured: Captured, ids: Tensor) -> float:
        with self.forward_lock, torch.no_grad(), use_attention(self.hf_model, "eager"):
            expected = self.hf_model(input_ids=ids[None], use_cache=False).logits[0]
        return relative_error(captured.model.logits(), expected.to(self.dtype))

    def __repr__(self) -> str:
        return f"ReplacementModel({self.family.model_type}, {self.transcoders!r}, {self.dtype}, {self.device})"


def check_model(op: str, model: object) -> None:
    """Require a ReplacementModel as first argument, where circuit-tracer's `attribute` has the prompt."""
    if not isinstance(model, ReplacementModel):
        raise TypeError(
            f"{op}: model must be a pc.ReplacementModel, got {type(model).__name__}; pc.load or "
            "pc.ReplacementModel(model, transcoders) makes one, and it comes before the prompt"
        )
    check_torch_threads(op)


def _split(features: SparseFeatures, lengths: list[int], ignore: int) -> list[SparseFeatures]:
    """Features of prompts one after another, without their ignored positions, split into one for each prompt."""
    result = []
    row = 0
    for length in lengths:
        empty = min(ignore, length)
        ptr = features.row_ptr[row : row + length - empty + 1]
        begin, end = int(ptr[0]), int(ptr[-1])
        row_ptr = torch.cat([ptr.new_zeros(empty), ptr - begin])
        index, value = features.index[begin:end].clone(), features.value[begin:end].clone()
        result.append(SparseFeatures(row_ptr, index, value))
        row += length - empty
    return result
