"""Text from a model whose features are steered, prompt and generated tokens alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from pycircuit.model.prompts import Prompt, is_one_prompt, prompt_list
from pycircuit.model.replacement import ReplacementModel
from pycircuit.model.transcoder_hooks import eager_transcoder_hooks
from pycircuit.ops import checks
from pycircuit.ops.torch_settings import without_autocast

from .intervention import Intervention, checked_interventions, checked_positions
from .intervention_run import BATCH_POSITIONS
from .steering import FeatureChanges, Placed, Steering, changes_by_layer

OP = "generate"


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token: the likeliest at temperature 0, else by chance among top_k, then top_p."""

    temperature: float
    top_k: int | None
    top_p: float | None

    @classmethod
    def checked(cls, temperature: float, top_k: int | None, top_p: float | None) -> Sampling:
        """Return the sampling of these arguments, or raise where one of them is out of range."""
        temperature = checks.number(OP, "temperature", temperature)
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"{OP}: temperature must be finite and not negative, got {temperature}")
        top_p = None if top_p is None else checks.number(OP, "top_p", top_p)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"{OP}: top_p must be above 0 and at most 1, got {top_p}")
        return cls(temperature, None if top_k is None else checks.whole_number(OP, "top_k", top_k, 1), top_p)

    def pick(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Pick a token for each prompt: [prompts] ids.

        logits: [prompts, vocabulary]; generators: one a prompt.
        """
        if not self.temperature:
            return logits.argmax(-1)
        probabilities = self.candidates(logits.double().cpu() / self.temperature).softmax(-1)
        picked = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
        return torch.cat(picked).to(logits.device)

    def candidates(self, logits: Tensor) -> Tensor:
        """Logits with those that may not be picked at minus infinity."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered = logits.softmax(-1).sort(descending=True)
            beyond = ordered.values.cumsum(-1) - ordered.values >= self.top_p  # the mass before a token is enough
            logits = logits.masked_fill(beyond.scatter(-1, ordered.indices, beyond), -torch.inf)
        return logits


@overload
def generate(  # type: ignore[overload-overlap]
    model: ReplacementModel,
    prompts: Prompt,
    steer: Sequence[Intervention] = (),
    *,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[int]: ...
@overload
def generate(
    model: ReplacementModel,
    prompts: Sequence[Prompt],
    steer: Sequence[Intervention] = (),
    *,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[list[int]]: ...
@without_autocast()
def generate(
    model: ReplacementModel,
    prompts: Prompt | Sequence[Prompt],
    steer: Sequence[Intervention] = (),
    *,
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[int] | list[list[int]]:
    """Generate the tokens that follow a prompt (a list of ids), or each of a list of prompts (a list of such lists).

    steer: interventions on the prompt and, where their positions have no end, on every generated token; nothing
    is frozen. temperature 0 takes the likeliest token; above it, one of the top_k likeliest, of those that make
    up top_p; seed and place in the list decide which. Ends after a token that ends a text.
    """
    sampling = Sampling.checked(temperature, top_k, top_p)
    count = checks.whole_number(OP, "max_new_tokens", max_new_tokens, 1)
    seed = checks.whole_number(OP, "seed", seed, 0)
    if seed >= 1 << 32:
        raise ValueError(f"{OP}: seed must be below 2^32, got {seed}")
    interventions = checked_interventions(OP, "steer", steer, model)
    ids = [model.tokens(prompt) for prompt in prompt_list(OP, prompts)]
    result = _generate(model, ids, interventions, sampling, count, seed)
    return result[0] if is_one_prompt(prompts) else result


def _generate(
    model: ReplacementModel,
    ids: list[Tensor],
    interventions: tuple[Intervention, ...],
    sampling: Sampling,
    count: int,
    seed: int,
) -> list[list[int]]:
    steer = {len(tokens): _positioned(model, interventions, len(tokens), count) for tokens in ids}
    generators = [torch.Generator().manual_seed((seed << 24) + i) for i in range(len(ids))]
    result: list[list[int]] = [[] for _ in ids]
    with model.forward_lock:
        for batch in _batches([len(tokens) for tokens in ids], count):
            stacked = torch.stack([ids[i] for i in batch])
            decoder = _Decoder(model, steer[stacked.shape[1]], stacked, count)
            for i, tokens in zip(batch, decoder.run(sampling, [generators[i] for i in batch]), strict=True):
                result[i] = tokens
    return result


def _positioned(
    model: ReplacementModel, interventions: Sequence[Intervention], prompt: int, count: int
) -> list[tuple[Intervention, range]]:
    """Interventions with their positions, those of tokens yet to come included."""
    longest = model.weights.longest
    if longest and prompt + count > longest:
        raise ValueError(
            f"{OP}: max_new_tokens must be at most {longest - prompt} after a prompt of {prompt} tokens (the model has "
            f"{longest} positions), got {count}"
        )
    return [
        (intervention, checked_positions(OP, intervention, prompt, prompt + count, model.ignore_positions))
        for intervention in interventions
    ]


def _batches(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Prompts of one length together, so that no padding comes between a prompt and what follows."""
    batches: list[list[int]] = []
    for length in sorted(set(lengths)):
        same = [i for i, n in enumerate(lengths) if n == length]
        step = max(1, BATCH_POSITIONS // (length + count))
        batches += [same[begin : begin + step] for begin in range(0, len(same), step)]
    return batches


class _Decoder:
    """Prompts of one length.

    Where an intervention scales, each has a twin without steering, whose value it scales.

    Rows of the batch are the prompts, then their twins, which are given the same tokens.
    """

    def __init__(
        self, model: ReplacementModel, steer: list[tuple[Intervention, range]], ids: Tensor, count: int
    ) -> None:
        self.model = model
        self.steer = steer
        self.ids = ids
        self.count = count
        self.prompts = len(ids)
        self.has_twins = any(intervention.factor is not None for intervention, _ in steer)
        self.steering = self._steering(0, 0)

    def run(self, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[list[int]]:
        """Generate the tokens that follow each prompt, up to and with the first that ends a text."""
        model = self.model
        end_tokens = _end_tokens(model.hf_model)
        result: list[list[int]] = [[] for _ in self.ids]
        unfinished = set(range(self.prompts))
        cache = None
        begin = 0
        tokens = self.ids
        hooks = eager_transcoder_hooks(
            model.hf_model,
            model.family,
            model.weights,
            model.transcoders.reads,
            model.transcoders.writes,
            lambda layer, x: self.steering.read(layer, x),
            self._write,
        )
        with hooks:
            for _ in range(self.count):
                self.steering = self._steering(begin, begin + tokens.shape[1])
                rows = torch.cat([tokens, tokens]) if self.has_twins else tokens
                out = model.hf_model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
                begin, cache = begin + tokens.shape[1], out.past_key_values
                logits = out.logits[: self.prompts, -1]
                self._check_finite(logits)
                picked = sampling.pick(logits, generators)
                tokens = picked[:, None]
                for i in sorted(unfinished):
                    result[i].append(int(picked[i]))
                unfinished -= {i for i in unfinished if result[i][-1] in end_tokens}
                if not unfinished:
                    break
        return result

    def _check_finite(self, logits: Tensor) -> None:
        """Raise if a change overflowed: its square, which the next norm needs, or a logit is infinite or NaN."""
        largest, limit = self.steering.largest(), torch.finfo(self.model.dtype).max ** 0.5
        if self.steer and not (largest <= limit and logits.isfinite().all()):
            raise ValueError(
                f"{OP}: steer must leave logits finite and changes of the stream below {limit:.1e}, got changes of "
                f"{largest:.1e}; lower value or factor"
            )

    def _steering(self, begin: int, end: int) -> Steering:
        """The changes of a forward over positions begin .. end."""
        placed: list[Placed] = [
            (row, position - begin, intervention)
            for intervention, positions in self.steer
            for position in range(begin, end)
            if position in positions
            for row in range(self.prompts)
        ]
        model = self.model
        changes = changes_by_layer(placed, model.weights.unembedding_mean)
        return Steering(model.transcoders, changes, self._original, range(0), range(model.depth))

    def _write(self, layer: int, y: Tensor) -> Tensor | None:
        return self.steering.write(layer, y) if layer in self.steering.pending else None

    def _original(self, layer: int, changes: FeatureChanges, x: Tensor) -> Tensor:
        if not self.has_twins:
            return torch.zeros_like(changes.value)  # nothing is scaled by it
        return self.steering.present(layer, changes, x, changes.row + self.prompts)


def _end_tokens(hf_model: Any) -> set[int]:
    """Tokens that end a text."""
    ends = getattr(getattr(hf_model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list | tuple) else {int(ends)}
