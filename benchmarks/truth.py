"""docs/truth.md and its figure, out of what `pycircuit benchmark-truth` wrote. `make truth` measures first."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycircuit.truth import figure, section

FOLDER = Path(__file__).parent
MODELS = ("demo", "smollm2")
PAGE, FIGURE = FOLDER.parent / "docs" / "truth.md", FOLDER.parent / "docs" / "truth.svg"

OPENING = """# What graphs are worth

A graph that obeys [its law](law.md) can still be wrong about the model. This page says how often graphs foretell what \
a model does. `make truth` measures it and writes the page; every figure below is one that `pycircuit benchmark-truth` \
prints.

![Correlation of predicted with measured effects, and the share of effects that graphs miss](truth.svg)

## How it is measured

Each model answers prompts of ten behaviours, those that it completes rightly with a probability above 0.5. The target \
of each graph is the answer alone. Features of the pruned graph, drawn at random, and its supernodes, found by \
structure, are ablated or doubled, and the change of the answer's centred logit is compared with three predictions.

- **Graph**: edges and all paths through features that have rows, none of which falls below zero.
- **Replacement model**: the same change is made in a model whose MLPs are transcoders and the errors of the prompt, \
and that model runs. It lacks only what the errors would have done differently; nothing in it is a straight line.
- **Gradient**: gradient times activation in the unchanged model, which needs no graph.

*Patterns and norms* held is what a graph assumes: attention patterns and denominators of norms keep their values \
(`freeze="attention"`). With *patterns* held the norms run, and with *nothing* held everything does.

**Random** transcoders have as many active features as the first set and rows of the same lengths. **Neurons** are the \
model's own: each is a feature with its gradient on the prompt as its encoder row, so no error is left. The intervals \
are bootstrapped over prompts (95%).
"""

READING = """## What to make of it

- **On the demo model the straight line is the weak part, not the transcoders.** With patterns and norms held, a graph \
foretells effects. With nothing held it foretells their signs, and their sizes much worse than the replacement model \
does, which is made of the same features. The neurons show the cause: they have no error, their graphs foretell nearly \
everything while norms are held, and far less as soon as norms run. A norm divides by what a feature adds to the \
stream: ablating a feature raises everything else, and doubling one that dominates the stream changes its length \
rather than its direction. That is first order, and a graph with frozen denominators leaves it out. The arithmetic is \
checked: tests hold small effects to the gradient.
- **So test a graph in the model.** With nothing held, a graph foretells the sign of most ablated supernodes, and \
that of most doubled ones wrongly. Before the size of an effect is believed, run `pc.intervene` with \
`freeze="none"`.
- **Errors explain what is missed between sets**: graphs with more error miss more, on the demo model whatever is \
held, on SmolLM2 only where a replacement model runs and nothing is held. Between prompts of one set, errors differ \
less and explain little.
- **On SmolLM2, graphs foretell ablated supernodes nearly as well as the replacement model does**, with nothing held \
too: norms spoil less there. Graphs of random transcoders foretell nothing of the kind. What both miss is what a short \
training leaves to the errors. The gradient foretells single features best, since one feature of a large model is a \
small change; of supernodes it is no better than the graph. Doubled ones no graph foretells, and the replacement model \
does.
- **Transcoders buy small circuits.** On the demo model the answer is gone without the few features of a pruned \
graph, and mostly stays without as many neurons. A circuit alone keeps a part of the answer only: what the other \
features add to the stream is missing from every norm.

## Limits

- Ablating a random feature takes away something that the error must then make up for, so that few random features \
look necessary. Their effects are predicted worst where a graph should be best.
- *Alone* means that every other feature that was active is ablated; errors stay, and features that become active \
then stay too.
- Neurons' graphs have rows for the most influential neurons only, and a pruned graph is no larger than these.
- With patterns and norms held, a large change can grow from MLP to MLP beyond what float32 holds. Such effects are \
left out, and a correlation sees little but those just below.
- The gradient is a straight line too: it includes norms and patterns, and is right for small changes only.
- The demo model is small, and was trained so that its circuits can be seen. SmolLM2's section has one set that was \
trained briefly: most of the influence in its graphs is that of errors. `make truth TRANSCODERS=folder` measures a set \
of your own, in hours.
"""


def page(documents: Sequence[dict[str, Any]]) -> str:
    """The page as Markdown."""
    return "\n".join([OPENING, *(section(document) for document in documents), READING])


def documents() -> list[dict[str, Any]]:
    """Results of every model that was measured."""
    paths = [FOLDER / "results" / f"truth-{model}.json" for model in MODELS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def main() -> None:
    """Write the page and the figure."""
    measured = documents()
    if not measured:
        sys.exit("truth: benchmarks/results must have truth-demo.json, got none; run make truth")
    PAGE.write_text(page(measured))
    FIGURE.write_text(figure(measured))
    print(page(measured))


if __name__ == "__main__":
    main()
