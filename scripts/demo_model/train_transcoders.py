"""Train the demo model's transcoders, cross-layer or per layer, on every statement."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

import pycircuit as pc
from pycircuit.demo.demo_model import load_model
from pycircuit.demo.facts import Facts
from pycircuit.transcoders import load as load_transcoders

# With few features a token, and rows that begin as tokens, the first layer, which only looks tokens up, learns a
# feature for each state. Both kinds read what the MLP reads: the norm before it is nothing for them to learn. Words are
# few, so the mean of what they read is much of what each of them is: less it, more of the influence comes from errors.
RECIPE = {
    "features": 1024, "k": (2, 4, 4), "reads": "mlp_in", "centre": False,
    "rate": 1e-3, "rows": "tokens", "revive": 100, "context": 16,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=["clt", "plt"])
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more of them sums round otherwise, and training ends in another set
    model, tokenizer = load_model(options.folder)
    prompts = [tokenizer.encode(s.prompt) for s in Facts.load(options.folder / "facts.json").statements()]
    trained = pc.train(model, prompts, kind=options.kind, steps=options.steps, **RECIPE)
    folder = options.folder / options.kind
    shutil.rmtree(folder, ignore_errors=True)
    trained.to(torch.bfloat16).save(folder, "pycircuit/demo")
    saved = load_transcoders(folder, dtype=torch.float32, lazy=False)
    print(pc.evaluate(model, saved, prompts, context=16))


if __name__ == "__main__":
    main()
