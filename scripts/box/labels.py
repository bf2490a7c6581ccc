"""Names for the features of the box, and the sums of all its files: the last step."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pycircuit import ReplacementModel
from pycircuit.demo.box import KINDS, load_model, save_labels, seal
from pycircuit.demo.facts import Facts
from pycircuit.demo.labels import labels
from pycircuit.transcoders import load as load_transcoders


def main(box: Path) -> None:
    model, names = load_model(box)
    found = {}
    for kind in KINDS:
        replaced = ReplacementModel(model, load_transcoders(box / kind, dtype=torch.float32, lazy=False), names)
        found[kind] = labels(replaced, Facts.load(box / "facts.json"))
        print(f"{kind}: {len(found[kind])} of {sum(map(replaced.transcoders.size, range(replaced.depth)))} named")
    save_labels(found, replaced.depth, box)
    seal(box)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
