"""Time and memory of a training step, beside plain PyTorch with a dense encoder and decoder.

    python benchmarks/train_step.py [--threads 2] [--rounds 7] [--json file]
    python benchmarks/train_step.py --whole TEXTS [--steps 2]    # SmolLM2's 30 layers, the model's forward included

Both start from the same weights and take the same fused Adam; they are run in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import torch
from torch import Tensor

from pycircuit.bench import machine_rates
from pycircuit.bench.whole_trace import markdown_table
from pycircuit.loading import language_model
from pycircuit.training import Recipe, Trainer
from pycircuit.training.learner import Learner

FEATURES, TOP, WIDTH, BATCH = 8192, 32, 512, 1024
NEEDS = "mebibytes beyond weights, moments, gradients and batch"


def sparse(x: Tensor, y: Tensor, features: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Our training step: (a step, the weights)."""
    learner = Learner(Recipe(features=features, k=TOP), 1, WIDTH, torch.float32, torch.device("cpu"))
    weights = list(learner.tensors().values())
    adam = torch.optim.Adam(weights, lr=1e-4, fused=True)

    def step() -> Tensor:
        loss = (learner.forward(x[None]).recon[0] - y).square().mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        return loss.detach()

    return step, weights


def dense(x: Tensor, y: Tensor, features: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Plain PyTorch's step, its pre-activations and activations [batch, features]: (a step, the weights)."""
    learner = Learner(Recipe(features=features, k=TOP), 1, WIDTH, torch.float32, torch.device("cpu"))
    w_enc, b_enc, w_dec = learner.w_enc[0], learner.b_enc[0], learner.w_dec[0].detach()[0].clone().requires_grad_()
    b_dec = learner.b_dec.detach()[0].clone().requires_grad_()
    weights = [w_enc, b_enc, w_dec, b_dec]
    adam = torch.optim.Adam(weights, lr=1e-4, fused=True)

    def step() -> Tensor:
        best = torch.addmm(b_enc, x, w_enc.T).relu().topk(TOP, sorted=False)
        active = torch.zeros(len(x), features).scatter(1, best.indices, best.values)
        loss = (torch.addmm(b_dec, active, w_dec) - y).square().mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        return loss.detach()

    return step, weights


FORMS = {"sparse": sparse, "dense": dense}


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, WIDTH, generator=g), torch.randn(batch, WIDTH, generator=g)


def timed(rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of both forms, in turn, after a check that they take the same steps."""
    x, y = inputs(BATCH)
    steps = {name: form(x, y, FEATURES)[0] for name, form in FORMS.items()}
    losses = {name: [float(step()) for _ in range(3)] for name, step in steps.items()}
    gap = max(abs(a - b) / b for a, b in zip(*losses.values(), strict=True))
    if not gap < 1e-4:
        raise AssertionError(f"train_step: both must take the same steps, got losses {losses}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    return times


def _peak() -> int:
    """Most bytes of resident memory since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def memory(form: str, features: int, batch: int) -> int:
    """Bytes that a step needs beyond weights, moments, gradients and batch; run in a process of its own."""
    step, _ = FORMS[form](*inputs(batch), features)
    step()  # moments and gradients are there from now on
    Path("/proc/self/clear_refs").write_text("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    step()
    return _peak() - before


def measured(form: str, features: int, batch: int) -> int:
    command = [sys.executable, __file__, "--memory", form, "--features", str(features), "--batch", str(batch)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(rounds: int) -> dict[str, Any]:
    others = machine_rates.Others()
    times = timed(rounds)
    taken = others.cores() or 0.0
    median = {name: statistics.median(t) for name, t in times.items()}
    needs = {
        f"{form}, F {features}, batch {batch}": measured(form, features, batch)
        for features, batch in ((FEATURES, BATCH), (FEATURES, 4 * BATCH), (2 * FEATURES, BATCH))
        for form in FORMS
    }
    return {
        "shape": f"F {FEATURES}, TopK {TOP}, d {WIDTH}, batch {BATCH}, {torch.get_num_threads()} threads",
        "milliseconds": {name: round(1e3 * t, 1) for name, t in median.items()},
        "range": {name: [round(1e3 * min(t), 1), round(1e3 * max(t), 1)] for name, t in times.items()},
        "ratio": round(median["dense"] / median["sparse"], 2),
        "load": os.getloadavg()[0],
        "others": round(taken, 2),
        NEEDS: {name: round(n / 2**20, 1) for name, n in needs.items()},
    }


def phase_seconds(texts: Path, steps: int) -> dict[str, float]:
    """Seconds of a step on SmolLM2's 30 layers, in all and by phase."""
    model, tokenizer = language_model("smollm2", torch.device("cpu"), torch.float32)
    recipe = Recipe(features=4096, k=TOP, steps=steps, batch=BATCH, buffer=steps * BATCH)
    trainer = Trainer(model, [texts.read_text(encoding="utf-8")], recipe, tokenizer)
    seconds: dict[str, float] = {}

    def timed_phase(owner: Any, name: str, phase: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = inner(*args, **options)
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begin
            return result

        setattr(owner, name, call)

    timed_phase(trainer.stream, "buffer", "model's forward")
    timed_phase(trainer.learner, "entries", "encode")
    timed_phase(trainer.fused, "_update", "gradients of rows and Adam")
    timed_phase(trainer.fused, "layer", "encode to Adam")
    begin = time.perf_counter()
    trainer.run(progress=False)
    return {name: t / steps for name, t in {**seconds, "step": time.perf_counter() - begin}.items()}


def markdown(results: dict[str, Any]) -> str:
    """Section of RESULTS.md."""
    lines = []
    for form in FORMS:
        low, high = results["range"][form]
        needs = [f"{n:.0f}" for name, n in results[NEEDS].items() if name.startswith(form)]
        lines.append((form, f"{results['milliseconds'][form]:.1f}", f"{low:.1f} to {high:.1f}", *needs))
    sizes = [name.partition(", ")[2] for name in results[NEEDS] if name.startswith("sparse")]
    text = [
        "# Training step",
        "",
        "Written by `make bench`; do not edit. Forward, backward and fused Adam of one layer's transcoder, ours",
        f"(sparse) and plain PyTorch's with a dense encoder and decoder, in turn: {results['shape']}.",
        "Both first take the same three steps, losses to 1e-4. MiB are beyond weights, moments, gradients and batch.",
        "",
        f"Dense over sparse: **{results['ratio']}x** (>= 3x: {'met' if results['ratio'] >= 3 else 'MISSED'}); load",
        f"{results['load']:.1f}, others took {results['others']:.1f} cores meanwhile.",
        "",
        *markdown_table(("form", "median ms", "range ms", *(f"MiB at {size}" for size in sizes)), lines),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = command_line.parser("train_step", __doc__, threads=2, rounds=15, results=True)
    parser.add_argument("--memory", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--features", type=int, default=FEATURES, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    parser.add_argument("--whole", type=Path, help="time a step on SmolLM2's 30 layers, on a file of text")
    parser.add_argument("--steps", type=int, default=2, help="steps of --whole; default 2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(memory(options.memory, options.features, options.batch))
        return
    if options.whole:
        for phase, t in phase_seconds(options.whole, options.steps).items():
            print(f"{phase:<28}{t:7.2f} s")
        return
    results = report(options.rounds)
    command_line.publish(options, "train", results, markdown(results))


if __name__ == "__main__":
    main()
