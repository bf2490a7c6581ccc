"""Tiny Llamas that learn a few hundred sentences in seconds, with transcoders, for the recipes of the documents.

The stream has two halves. Embeddings and attention write to the first, which MLPs read; MLPs write to the second, which
attention's values and the unembedding read. So attention moves only what MLPs wrote, every step of a circuit passes
through an MLP, and transcoders see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pycircuit.graph import Graph
from pycircuit.interventions import Intervention, intervene
from pycircuit.model import ReplacementModel
from pycircuit.training import train

from .tokenizer import BOS, NameTokenizer

BATCH, WARMUP, DECAY = 64, 20, 0.3
EMBEDDING_RATE = 0.1  # of the embeddings over that of the rest: they stay short beside what attention brings
_IGNORED = -100  # cross_entropy's label of a place without a loss


class Sentence(NamedTuple):
    """A prompt and the words that the model learns to write after it."""

    prompt: str
    answer: str


class Recipe(NamedTuple):
    """Sizes and lengths of a tiny model's training and of its transcoders'.

    k: active features a token, by layer; window: how far back attention sees, the token itself included.
    """

    steps: int
    features: int
    k: tuple[int, ...]
    width: int = 64
    rate: float = 6e-3
    transcoder_steps: int = 250
    window: int | None = None
    seed: int = 0


def vocabulary(sentences: Sequence[Sentence]) -> list[str]:
    """Every word of the sentences, the opening token first."""
    return [BOS, *sorted({word for sentence in sentences for word in f"{sentence.prompt} {sentence.answer}".split()})]


def tiny_model(
    sentences: Sequence[Sentence], recipe: Recipe, others: Sequence[Sentence] = (), easier: Sequence[Sentence] = ()
) -> ReplacementModel:
    """Train a Llama on the sentences, then transcoders on the sentences and on `others`.

    others: sentences that the model is to be traced on but does not learn. easier: sentences of the same words that it
    learns first, in half the steps.
    """
    everything = [*sentences, *others]
    tokenizer = NameTokenizer(vocabulary(everything))
    hf_model = tiny_llama(len(tokenizer.words), recipe)
    if easier:
        learn(hf_model, tokenizer, easier, recipe._replace(steps=recipe.steps // 2))
    learn(hf_model, tokenizer, sentences, recipe)
    texts = [tokenizer.encode(f"{sentence.prompt} {sentence.answer}")[:-1] for sentence in everything]
    transcoders = train(
        hf_model, texts, features=recipe.features, k=recipe.k, rows="tokens", steps=recipe.transcoder_steps,
        batch=256, rate=5e-3, passes=20, revive=50, seed=recipe.seed, progress=False,
    )  # fmt: skip
    model = ReplacementModel(hf_model, transcoders, tokenizer)
    model.labels.update(names_of_first_layer(model))
    return model


def names_of_first_layer(model: ReplacementModel) -> dict[tuple[int, int], str]:
    """Names of the first layer's features: the words that each is active on, since it reads nothing but embeddings."""
    words: dict[int, list[str]] = {}
    for token, word in enumerate(model.tokenizer.words[1:], 1):
        for feature in model.activations([0, token])[0].index.tolist():
            words.setdefault(feature, []).append(word)
    return {(0, feature): " / ".join(names) for feature, names in words.items()}


def active(model: ReplacementModel, prompt: str, layer: int, position: int) -> dict[int, float]:
    """Activations by feature of a layer's active features at a position of the prompt."""
    features = model.activations(prompt)[layer]
    begin, end = features.row_ptr[position : position + 2].tolist()
    return dict(zip(features.index[begin:end].tolist(), features.value[begin:end].tolist(), strict=True))


def swap(
    model: ReplacementModel, prompt: str, other: str, layer: int, position: int, other_position: int | None = None
) -> list[Intervention]:
    """Interventions on `prompt` that give the features at a place the values they have on another prompt.

    other_position: the place there; None: the same.
    """
    there = position if other_position is None else other_position
    values = dict.fromkeys(active(model, prompt, layer, position), 0.0) | active(model, other, layer, there)
    return [Intervention(layer, position, feature, value=value) for feature, value in values.items()]


def tiny_llama(words: int, recipe: Recipe) -> Any:
    """An untrained Llama whose stream has two halves; with a window, a Mistral."""
    import transformers

    torch.manual_seed(recipe.seed)
    shape: dict[str, Any] = {
        "vocab_size": words, "hidden_size": recipe.width, "intermediate_size": recipe.width,
        "num_hidden_layers": len(recipe.k), "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.5 / recipe.width**0.5, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model: Any
    if recipe.window is None:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**shape, sliding_window=recipe.window))
    for name, weight in model.named_parameters():
        mask = _half(name, weight)
        if mask is not None:
            weight.data.mul_(mask)
    return model


def _half(name: str, weight: Tensor) -> Tensor | None:
    """Mask of the entries of a weight that may differ from zero; None: all of them."""
    mask, half = torch.ones_like(weight), weight.new_ones(weight.shape[-1])
    half[len(half) // 2 :] = 0
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind in ("embed_tokens", "gate_proj", "up_proj"):
        return mask * half
    if kind in ("v_proj", "lm_head"):
        return mask * (1 - half)
    if kind in ("o_proj", "down_proj"):
        mask[len(mask) // 2 :] = 0
        return mask if kind == "o_proj" else 1 - mask
    return None


def padded(tokenizer: NameTokenizer, sentences: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
    """(ids, the next token where it belongs to the answer), [sentences, longest] each."""
    rows, labels = [], []
    for sentence in sentences:
        prompt, answer = tokenizer.encode(sentence.prompt), tokenizer.encode(sentence.answer)[1:]
        rows.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([_IGNORED] * (len(prompt) - 1) + [*answer, _IGNORED]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=_IGNORED)


def learn(hf_model: Any, tokenizer: NameTokenizer, sentences: Sequence[Sentence], recipe: Recipe) -> None:
    """Train the model to write each sentence's answer."""
    ids, labels = padded(tokenizer, sentences)
    generator = torch.Generator().manual_seed(recipe.seed)
    masks = [
        (weight, mask) for name, weight in hf_model.named_parameters() if (mask := _half(name, weight)) is not None
    ]
    embedding = hf_model.model.embed_tokens.weight
    groups: list[dict[str, Any]] = [
        {"params": [p for p in hf_model.parameters() if p is not embedding], "factor": 1.0},
        {"params": [embedding], "factor": EMBEDDING_RATE},
    ]
    adam = torch.optim.AdamW(groups, recipe.rate, betas=(0.9, 0.98), weight_decay=DECAY, fused=True)
    hf_model.train()
    for step in range(recipe.steps):
        rate = recipe.rate * min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
        for group in adam.param_groups:
            group["lr"] = group["factor"] * rate
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        logits = hf_model(input_ids=ids[rows], use_cache=False).logits
        adam.zero_grad()
        cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), ignore_index=_IGNORED).backward()
        for weight, mask in masks:
            weight.grad.mul_(mask)
        adam.step()
    hf_model.eval()


def first_choice(model: ReplacementModel, prompt: str, changes: Sequence[Intervention] = ()) -> str:
    """The likeliest word after a prompt."""
    word: str = model.tokenizer.decode(int(next_word(model, prompt, changes).argmax()))
    return word


def token_shares(graph: Graph) -> dict[str, float]:
    """Share of the influence on the targets that comes from each word of the prompt, of all that comes from words."""
    influence = graph.influence()[graph.first_token : graph.first_target]
    shares: dict[str, float] = {}
    for word, share in zip(graph.tokens.text, (influence / influence.sum()).tolist(), strict=True):
        shares[word] = shares.get(word, 0.0) + share
    return shares


@torch.no_grad()
def next_word(model: ReplacementModel, prompt: str, changes: Sequence[Intervention] = ()) -> Tensor:
    """Probabilities of the word after a prompt: [vocabulary]. Where features are changed, everything else follows."""
    if changes:
        return intervene(model, prompt, changes, freeze="none").probabilities
    logits: Tensor = model.hf_model(input_ids=model.tokens(prompt)[None], use_cache=False).logits
    return logits[0, -1].softmax(-1)


@torch.no_grad()
def accuracy(model: ReplacementModel, sentences: Sequence[Sentence]) -> float:
    """Share of the sentences whose answer is the model's first choice, word by word."""
    ids, labels = padded(model.tokenizer, sentences)
    right = (model.hf_model(input_ids=ids, use_cache=False).logits.argmax(-1) == labels) | (labels == _IGNORED)
    return float(right.all(1).double().mean())
