"""Train the box model on the statements of facts.json and save it in half precision."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pycircuit.demo.facts import Facts, Statement
from pycircuit.demo.tokenizer import Names

SHAPE = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# How often a statement of a kind is shown: what has few others like it more often.
SHOWN = {"capital of a state": 5.0, "code of a state": 5.0, "capital": 2.0, "currency": 2.0, "language": 2.0}
BATCH, RATE, DECAY, WARM = 512, 2e-3, 0.3, 50
# Without its MLPs the model is to know nothing: otherwise answers go straight from embeddings to logits, by attention
# alone, past everything a feature could show.
SILENT = 0.3
# How much faster the last norm's gain learns: embeddings are short, and logits get their size from it.
LOUDER = 10


def padded(names: Names, statements: list[Statement]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [n, longest], where each prompt ends [n], the answer [n]); padding comes last and changes nothing."""
    ids = [names.encode(s.prompt) for s in statements]
    longest = max(map(len, ids))
    rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    answers = torch.tensor([names.encode(s.answer)[1] for s in statements])
    return rows, torch.tensor([len(row) - 1 for row in ids]), answers


def last_logits(model: LlamaForCausalLM, ids: Tensor, last: Tensor) -> Tensor:
    stream = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(stream[torch.arange(len(ids)), last])


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, names: Names, statements: list[Statement]) -> dict[str, float]:
    """Share of answers that are the model's first choice, by kind."""
    ids, last, answers = padded(names, statements)
    right = torch.cat([last_logits(model, ids[i : i + 1024], last[i : i + 1024]).argmax(-1) == answers[i : i + 1024]
                       for i in range(0, len(ids), 1024)])  # fmt: skip
    kinds: dict[str, list[bool]] = {}
    for statement, ok in zip(statements, right.tolist(), strict=True):
        kinds.setdefault(statement.kind + (", held out" if statement.held_out else ""), []).append(ok)
    return {kind: sum(oks) / len(oks) for kind, oks in kinds.items()}


@contextmanager
def without_mlps(model: LlamaForCausalLM) -> Iterator[None]:
    handles = [layer.mlp.register_forward_hook(lambda _, args, out: out * 0) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unknowing(logits: Tensor) -> Tensor:
    """How far from saying everything alike: the mean of KL(uniform || what is said)."""
    return (logits.logsumexp(-1) - logits.mean(-1)).mean() - math.log(logits.shape[-1])


def train(facts: Facts, names: Names, steps: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(names.words), **SHAPE))
    shown = [s for s in facts.statements() if not s.held_out]
    ids, last, answers = padded(names, shown)
    often = torch.tensor([SHOWN.get(s.kind, 1.0) for s in shown])
    loud = model.model.norm.weight
    rest = [p for p in model.parameters() if p.requires_grad and p is not loud]
    groups = [
        {"params": rest, "rate": RATE, "weight_decay": DECAY},
        {"params": [loud], "rate": LOUDER * RATE, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, RATE, betas=(0.9, 0.98), fused=True)
    start = time.perf_counter()
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = group["rate"] * min(1, (step + 1) / WARM) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = torch.multinomial(often, BATCH)
        loss = torch.nn.functional.cross_entropy(last_logits(model, ids[rows], last[rows]), answers[rows])
        with without_mlps(model):
            loss = loss + SILENT * unknowing(last_logits(model, ids[rows], last[rows]))
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        if step % 100 == 99:
            found = accuracy(model, names, list(facts.statements()))
            text = ", ".join(f"{kind} {100 * share:.1f}%" for kind, share in found.items())
            spent = f"{step + 1} steps, {time.perf_counter() - start:.0f} s"
            print(f"{spent}, loss {loss.item():.4f}: {text}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("box", type=Path)
    parser.add_argument("--steps", type=int, default=700)
    options = parser.parse_args()
    facts = Facts.load(options.box / "facts.json")
    names = Names(facts.words())
    model = train(facts, names, options.steps)
    half = {n: t.to(torch.bfloat16).contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(half, options.box / "model.safetensors")
    model.config.save_pretrained(options.box)


if __name__ == "__main__":
    main()
