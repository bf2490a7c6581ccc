"""Text from a model whose features are steered, prompt and generated tokens alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycircuit.model.replacement import ReplacementModel
from pycircuit.model.sites import hooked
from pycircuit.ops import checks
from pycircuit.ops.torch_settings import without_autocast

from .intervention import Intervention, interventions_of, positions_of
from .intervention_run import BATCH_POSITIONS
from .steering import Entries, Place, Steering, entries_of

OP = "generate"


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked: the likeliest at temperature 0, else by chance among top_k, then top_p."""

    temperature: float
    top_k: int | None
    top_p: float | None

    @classmethod
    def of(cls, temperature: Any, top_k: Any, top_p: Any) -> Sampling:
        heat = checks.number(OP, "temperature", temperature)
        if not 0 <= heat < float("inf"):
            raise ValueError(f"{OP}: temperature must be finite and not negative, got {heat}")
        share = None if top_p is None else checks.number(OP, "top_p", top_p)
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{OP}: top_p must be above 0 and at most 1, got {share}")
        return cls(heat, None if top_k is None else checks.whole_number(OP, "top_k", top_k, 1), share)

    def pick(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """logits: [prompts, vocabulary], a generator a prompt -> [prompts] token ids."""
        if not self.temperature:
            return logits.argmax(-1)
        kept = self._kept(logits.double().cpu() / self.temperature)
        picked = [torch.multinomial(p, 1, generator=g) for p, g in zip(kept.softmax(-1), generators, strict=True)]
        return torch.cat(picked).to(logits.device)

    def _kept(self, logits: Tensor) -> Tensor:
        """Logits with those that may not be picked at minus infinity."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered = logits.softmax(-1).sort(descending=True)
            beyond = ordered.values.cumsum(-1) - ordered.values >= self.top_p  # the mass before a token is enough
            logits = logits.masked_fill(beyond.scatter(-1, ordered.indices, beyond), -torch.inf)
        return logits


@without_autocast()
def generate(
    model: ReplacementModel,
    prompts: Any,
    steer: Sequence[Intervention] = (),
    max_new_tokens: int = 20,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[int] | list[list[int]]:
    """The tokens that follow a prompt (a list of ids), or each of a list of prompts (a list of such lists).

    steer: interventions on the prompt and, where their positions have no end, on every generated token; nothing
    is frozen. temperature 0 takes the likeliest token; above it, one of the top_k likeliest, of those that make
    up top_p; seed and place in the list decide which. Ends after a token that ends a text.
    """
    sampling = Sampling.of(temperature, top_k, top_p)
    count = checks.whole_number(OP, "max_new_tokens", max_new_tokens, 1)
    seed = checks.whole_number(OP, "seed", seed, 0)
    if seed >= 1 << 32:
        raise ValueError(f"{OP}: seed must be below 2^32, got {seed}")
    given = interventions_of(OP, "steer", steer, model)
    single = isinstance(prompts, str) or hasattr(prompts, "tolist")
    single = single or (isinstance(prompts, Sequence) and all(map(checks.is_int, prompts)))
    ids = [model.tokens(prompt) for prompt in ([prompts] if single else _several(prompts))]
    where = {len(t): _where(model, given, len(t), count) for t in ids}
    generators = [torch.Generator().manual_seed((seed << 24) + i) for i in range(len(ids))]
    found: list[list[int]] = [[] for _ in ids]
    with model.running:
        for batch in _batches([len(t) for t in ids], count):
            together = torch.stack([ids[i] for i in batch])
            decoder = _Decoder(model, where[together.shape[1]], together, count)
            for at, tokens in zip(batch, decoder.run(sampling, [generators[i] for i in batch]), strict=True):
                found[at] = tokens
    return found[0] if single else found


def _several(prompts: Any) -> Sequence[Any]:
    if not isinstance(prompts, Sequence):
        raise TypeError(f"{OP}: prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    return prompts


def _where(
    model: ReplacementModel, given: Sequence[Intervention], prompt: int, count: int
) -> list[tuple[Intervention, range]]:
    """At which positions each intervention acts, those of tokens yet to come included."""
    longest = model.weights.longest
    if longest and prompt + count > longest:
        raise ValueError(
            f"{OP}: max_new_tokens must be at most {longest - prompt} after a prompt of {prompt} tokens (the model has "
            f"{longest} positions), got {count}"
        )
    return [(one, positions_of(OP, one, prompt, prompt + count, model.ignore_positions)) for one in given]


def _batches(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Prompts of one length together, so that no padding comes between a prompt and what follows."""
    batches: list[list[int]] = []
    for length in sorted(set(lengths)):
        same = [i for i, n in enumerate(lengths) if n == length]
        step = max(1, BATCH_POSITIONS // (length + count))
        batches += [same[begin : begin + step] for begin in range(0, len(same), step)]
    return batches


class _Decoder:
    """Prompts of one length. Where an intervention scales, each has a twin without steering that tells what to scale.

    Rows of the batch are the prompts, then their twins, which are given the same tokens.
    """

    def __init__(
        self, model: ReplacementModel, steer: list[tuple[Intervention, range]], ids: Tensor, count: int
    ) -> None:
        self.model, self.steer, self.ids, self.count = model, steer, ids, count
        self.prompts = len(ids)
        self.twins = any(one.factor is not None for one, _ in steer)
        self.steering = self._steering(0, 0)

    def run(self, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[list[int]]:
        """The tokens that follow each prompt, up to and with the first that ends a text."""
        model, ends = self.model, _ends(self.model.hf_model)
        found: list[list[int]] = [[] for _ in self.ids]
        open_, cache, begin, tokens = set(range(self.prompts)), None, 0, self.ids
        hooks = hooked(
            model.hf_model, model.family, model.weights, model.transcoders.reads, model.transcoders.writes,
            lambda layer, x: self.steering.read(layer, x), self._write,
        )  # fmt: skip
        with hooks:
            for _ in range(self.count):
                self.steering = self._steering(begin, begin + tokens.shape[1])
                rows = torch.cat([tokens, tokens]) if self.twins else tokens
                out = model.hf_model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
                begin, cache = begin + tokens.shape[1], out.past_key_values
                picked = sampling.pick(out.logits[: self.prompts, -1], generators)
                tokens = picked[:, None]
                for at in sorted(open_):
                    found[at].append(int(picked[at]))
                open_ -= {at for at in open_ if found[at][-1] in ends}
                if not open_:
                    break
        return found

    def _steering(self, begin: int, end: int) -> Steering:
        """The changes of a forward over these positions."""
        places: list[Place] = [
            (row, position - begin, one)
            for one, positions in self.steer
            for position in range(begin, end)
            if position in positions
            for row in range(self.prompts)
        ]
        model = self.model
        entries = entries_of(places, model.weights.unembedding_mean)
        return Steering(model.transcoders, entries, self._original, range(0), range(model.depth))

    def _write(self, layer: int, y: Tensor) -> Tensor | None:
        return self.steering.write(layer, y) if layer in self.steering.pending else None

    def _original(self, layer: int, e: Entries, x: Tensor) -> Tensor:
        if not self.twins:
            return torch.zeros_like(e.value)  # nothing is scaled by it
        return self.steering.present(layer, e, x, e.row + self.prompts)


def _ends(hf_model: Any) -> set[int]:
    """Tokens that end a text."""
    ends = getattr(getattr(hf_model, "generation_config", None), "eos_token_id", None)
    return set() if ends is None else set(ends) if isinstance(ends, list | tuple) else {int(ends)}
