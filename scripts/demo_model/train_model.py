"""Train the demo model on the statements of facts.json and save it in half precision.

Five penalties make the model keep its facts in the MLPs, where a transcoder sees them, and its circuits short:
attention must move what MLPs wrote rather than tokens' embeddings (MOVED), no embedding may give the answer by itself
(DIRECT), neurons are quiet unless they help (ACTIVE), which also makes the model learn faster, and so are attention
heads (ATTENDED), which keeps what <bos> and words of no consequence write out of the answer. No MLP outshouts the
stream that it writes to (WRITTEN), or ablating a feature would change every norm behind it.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, relu
from transformers import LlamaConfig, LlamaForCausalLM

from pycircuit.demo.facts import Facts, Statement
from pycircuit.demo.tokenizer import NameTokenizer

SHAPE = {
    "hidden_size": 128, "intermediate_size": 512, "hidden_act": "relu",
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# Sampling weight of a kind of statement: kinds with few statements are shown more often.
SAMPLING = {"capital of a state": 5.0, "code of a state": 5.0, "capital": 2.0, "currency": 2.0, "language": 2.0}
BATCH, RATE, DECAY, WARM = 512, 2e-3, 0.3, 50
GAIN_RATE = 10  # factor on the rate of the last norm's gain: embeddings are short, and logits get their size from it
MOVED, DIRECT, ACTIVE, ATTENDED, WRITTEN = 30.0, 0.05, 5e-3, 0.03, 0.015  # weights of the penalties
PENALTY_WARMUP = 150  # steps over which they grow from zero


class ForwardPass(NamedTuple):
    """Logits and the five penalized quantities.

    logits: [prompts, vocabulary] at the last token; direct: the share of them that embeddings give, with attention
    and norms frozen; moved: squared norm of the embeddings that attention moves over that of the stream; active: norm
    of what neurons write; attended: norm of what heads write, source by source; written: squared norm of what MLPs
    write over that of the stream they write to.
    """

    logits: Tensor
    direct: Tensor
    moved: Tensor
    active: Tensor
    attended: Tensor
    written: Tensor


def padded(tokenizer: NameTokenizer, statements: list[Statement]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [n, longest], last position of each prompt [n], the answer [n]); padding comes last and changes nothing."""
    ids = [tokenizer.encode(s.prompt) for s in statements]
    longest = max(map(len, ids))
    rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    answers = torch.tensor([tokenizer.encode(s.answer)[1] for s in statements])
    return rows, torch.tensor([len(row) - 1 for row in ids]), answers


def rotate(x: Tensor) -> Tensor:
    """Apply the rotary position embedding. x: [..., T, d]."""
    count, size = x.shape[-2:]
    angle = torch.arange(count)[:, None] * 10000 ** -(torch.arange(0, size, 2) / size)
    angle = torch.cat([angle, angle], -1)
    half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
    return x * angle.cos() + half * angle.sin()


def gain(x: Tensor, norm: torch.nn.Module) -> Tensor:
    """The factor that the norm multiplies x by."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight


def forward(model: LlamaForCausalLM, ids: Tensor, last: Tensor) -> ForwardPass:
    """Run the model, and beside it its embeddings alone through frozen attention. ids: [n, T]; last: [n]."""
    count, heads = ids.shape[1], SHAPE["num_attention_heads"]
    mask = torch.full((count, count), -1e9).triu(1)
    real = (torch.arange(count) <= last[:, None]).float()  # [n, T], zero for padding

    def split(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    x = embedded = model.model.embed_tokens(ids)
    moved, active, attended, written = (x.new_zeros(()) for _ in range(4))
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        g = gain(x, layer.input_layernorm)
        q, k = (rotate(split(project(x * g))) for project in (attention.q_proj, attention.k_proj))
        pattern = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        value = split(attention.v_proj(x * g))
        sent = value @ attention.o_proj.weight.T.unflatten(0, (heads, -1))
        by_source = pattern * sent.norm(dim=-1)[:, :, None]  # [n, heads, T, source]
        attended = attended + (by_source.sum((1, 3)) * real).sum() / real.sum()
        output, carried = (
            attention.o_proj((pattern @ v).transpose(1, 2).flatten(2))
            for v in (value, split(attention.v_proj(embedded * g)))
        )
        moved = moved + (carried.square().sum(-1) * real).sum() / (x.square().sum(-1) * real).sum().detach()
        x, embedded = x + output, embedded + carried
        h = x * gain(x, layer.post_attention_layernorm)
        neurons = relu(mlp.gate_proj(h)) * mlp.up_proj(h)
        active = active + (neurons.abs() @ mlp.down_proj.weight.norm(dim=0) * real).sum() / real.sum()
        y = mlp.down_proj(neurons)
        share = y.square().sum(-1) / (x.square().sum(-1) + 1e-6)
        written = written + (share * real).sum() / real.sum()
        x = x + y
    g, prompt = gain(x, model.model.norm), torch.arange(len(ids))
    logits, direct = (model.lm_head((t * g)[prompt, last]) for t in (x, embedded))
    return ForwardPass(logits, direct, moved, active, attended, written)


def loss(out: ForwardPass, answers: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy of the answers, sum of the penalties)."""
    direct = (out.direct - out.direct.mean(-1, keepdim=True)).gather(1, answers[:, None])
    penalty = MOVED * out.moved + DIRECT * direct.square().mean()
    penalty = penalty + ACTIVE * out.active + ATTENDED * out.attended + WRITTEN * out.written
    return cross_entropy(out.logits, answers), penalty


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: NameTokenizer, statements: list[Statement]) -> dict[str, float]:
    """Share of answers that are the first choice of the model as transformers runs it, by kind."""
    ids, last, answers = padded(tokenizer, statements)
    kinds: dict[str, list[bool]] = {}
    for i in range(0, len(ids), 1024):
        stream = model.model(input_ids=ids[i : i + 1024], use_cache=False).last_hidden_state
        position = last[i : i + 1024]
        right = model.lm_head(stream[torch.arange(len(position)), position]).argmax(-1) == answers[i : i + 1024]
        for statement, ok in zip(statements[i : i + 1024], right.tolist(), strict=True):
            kinds.setdefault(statement.kind + (", held out" if statement.held_out else ""), []).append(ok)
    return {kind: sum(oks) / len(oks) for kind, oks in kinds.items()}


def train(facts: Facts, tokenizer: NameTokenizer, steps: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # with more of them sums round otherwise, and training ends in another model
    torch.set_flush_denormal(True)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer.words), **SHAPE))
    statements = [s for s in facts.statements() if not s.held_out]
    ids, last, answers = padded(tokenizer, statements)
    sampling = torch.tensor([SAMPLING.get(s.kind, 1.0) for s in statements])
    final_gain = model.model.norm.weight
    groups = [
        {"params": [p for p in model.parameters() if p is not final_gain], "rate": RATE, "weight_decay": DECAY},
        {"params": [final_gain], "rate": GAIN_RATE * RATE, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, RATE, betas=(0.9, 0.98), fused=True)
    start = time.perf_counter()
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = group["rate"] * min(1, (step + 1) / WARM) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = torch.multinomial(sampling, BATCH)
        cost, penalty = loss(forward(model, ids[rows], last[rows]), answers[rows])
        adam.zero_grad(set_to_none=True)
        (cost + min(1, step / PENALTY_WARMUP) * penalty).backward()
        adam.step()
        if step % 50 == 49:
            shares = accuracy(model, tokenizer, list(facts.statements()))
            text = ", ".join(f"{kind} {100 * share:.1f}%" for kind, share in shares.items())
            print(f"{step + 1} steps, {time.perf_counter() - start:.0f} s, loss {cost.item():.4f}: {text}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    facts = Facts.load(options.folder / "facts.json")
    model = train(facts, NameTokenizer(facts.words()), options.steps)
    half = {n: t.to(torch.bfloat16).contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(half, options.folder / "model.safetensors")
    model.config.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
