"""Train the box's transcoders, cross-layer and per layer, on every statement."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

import pycircuit as pc
from pycircuit.demo.box import load_model
from pycircuit.demo.facts import Facts
from pycircuit.transcoders import load as load_transcoders

# The first layer only looks tokens up: with few features to spend on each, and rows that begin as tokens do, a feature
# for each state is what pays. The later layers say many things at once.
RECIPE = {"features": 640, "k": (2, 8, 10), "rate": 1e-3, "rows": "tokens", "revive": 100, "context": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("box", type=Path)
    parser.add_argument("kind", choices=["clt", "plt"])
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    model, names = load_model(options.box)
    prompts = [names.encode(s.prompt) for s in Facts.load(options.box / "facts.json").statements()]
    made = pc.train(model, prompts, kind=options.kind, steps=options.steps, **RECIPE)
    shutil.rmtree(options.box / options.kind, ignore_errors=True)
    made.to(torch.bfloat16).save(options.box / options.kind, "pycircuit/box")
    made = load_transcoders(options.box / options.kind, dtype=torch.float32, lazy=False)
    print(pc.evaluate(model, made, prompts, context=16))


if __name__ == "__main__":
    main()
