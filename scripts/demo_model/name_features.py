"""Name the features of the demo model and write the checksums of its files: the last step."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pycircuit import ReplacementModel
from pycircuit.demo.demo_model import KINDS, load_model, save_labels, write_checksums
from pycircuit.demo.facts import Facts
from pycircuit.demo.feature_names import feature_names
from pycircuit.transcoders import load as load_transcoders


def main(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    names = {}
    for kind in KINDS:
        transcoders = load_transcoders(folder / kind, dtype=torch.float32, lazy=False)
        replacement = ReplacementModel(model, transcoders, tokenizer)
        names[kind] = feature_names(replacement, Facts.load(folder / "facts.json"))
        total = sum(map(replacement.transcoders.size, range(replacement.depth)))
        print(f"{kind}: {len(names[kind])} of {total} named")
    save_labels(names, replacement.depth, folder)
    write_checksums(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
