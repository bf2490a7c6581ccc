"""Train the box's transcoders, cross-layer and per layer, on every statement."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

import pycircuit as pc
from pycircuit.demo.box import load_model
from pycircuit.demo.facts import Facts
from pycircuit.transcoders import formats

RECIPE = {"features": 768, "steps": 1000, "k": 16, "batch": 1024, "activation": "topk", "revive": 200, "context": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("box", type=Path)
    parser.add_argument("kind", choices=["clt", "plt"])
    for name, value in RECIPE.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = vars(parser.parse_args())
    box, kind = options.pop("box"), options.pop("kind")
    torch.manual_seed(0)
    model, names = load_model(box)
    prompts = [names.encode(s.prompt) for s in Facts.load(box / "facts.json").statements()]
    made = pc.train(model, prompts, kind=kind, **options)
    shutil.rmtree(box / kind, ignore_errors=True)
    formats.save(made.to(torch.bfloat16), box / kind, "pycircuit/box")
    made = formats.load(box / kind, dtype=torch.float32, lazy=False)
    print(pc.evaluate(model, made, prompts, context=16))


if __name__ == "__main__":
    main()
