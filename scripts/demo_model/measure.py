"""Print every figure of the demo model that its documents give."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

import pycircuit as pc
from pycircuit.demo import measurements
from pycircuit.demo.circuit_shares import ROUTE
from pycircuit.demo.demo_model import KINDS, load_demo
from pycircuit.demo.facts import DATA, Facts

SAMPLE = 7  # every so many statements


def median(name: str, values: Sequence[float]) -> None:
    """Print the median of shares and their range."""
    print(f"  {name}: {100 * statistics.median(values):.1f}% ({100 * min(values):.1f} to {100 * max(values):.1f})")


def circuits(model: pc.ReplacementModel, facts: Facts) -> None:
    """Print shares of the influence on the answers about a city of each state."""
    shares = measurements.state_circuits(model, facts)
    print(f"share of the influence on the answer, median over {len(shares)} states (least to most):")
    median("through the state, the question or the answer", [s.named for s in shares.values()])
    median("from errors", [s.errors for s in shares.values()])
    median("from the city through the state to the answer", [s.route for s in shares.values()])
    first = sum(s.concepts == ROUTE for s in shares.values())
    print(f"  strongest of all routes: in {first} of {len(shares)} states; another one for")
    for city, s in shares.items():
        if s.concepts != ROUTE:
            strongest = f"{', '.join(s.concepts)} {100 * s.strongest:.1f}%"
            print(f"    {city}, {facts.state[city]}: {100 * s.route:.1f}%, {strongest}")


def swaps(model: pc.ReplacementModel, facts: Facts) -> None:
    """Print successes of swapped states."""
    states = measurements.swaps(model, facts)
    wrong = [swap for swap in states if swap.answer != swap.expected]
    print(f"states swapped: {len(states) - len(wrong)} of {len(states)}; others for")
    for swap in wrong:
        print(f"  {swap.city}, {swap.other_city}: {swap.features} features, {swap.answer}, not {swap.expected}")


def names(model: pc.ReplacementModel, facts: Facts) -> None:
    """Print how many features have names, and for which concepts."""
    for layer in range(model.depth):
        labels = {label for (at_layer, _), label in model.labels.items() if at_layer == layer}
        count = sum(at_layer == layer for at_layer, _ in model.labels)
        states, says = len(labels & set(facts.capital)), sum(label.startswith("say ") for label in labels)
        countries = len(labels & {country.names[0] for country in facts.countries})
        print(f"layer {layer}: {count} of {model.transcoders.size(layer)} features named; {states} states, "
              f"{countries} countries, {says} answers")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=DATA)
    parser.add_argument("--kind", choices=KINDS, nargs="*", default=KINDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = Facts.load(options.folder / "facts.json")
    statements = list(facts.statements())
    for kind in options.kind:
        model = load_demo(kind, folder=options.folder)
        print(f"== {kind}")
        if kind == options.kind[0]:
            accuracy = measurements.accuracy(model, statements).items()
            print("right answers: " + ", ".join(f"{name} {100 * share:.1f}%" for name, share in accuracy))
        sample = statements[::SAMPLE]
        print(f"replacement model, same answers: {100 * measurements.agreement(model, sample):.1f}%")
        prompts = [model.tokens(statement.prompt) for statement in sample]
        print(pc.evaluate(model, model.transcoders, prompts, progress=False))
        names(model, facts)
        circuits(model, facts)
        swaps(model, facts)


if __name__ == "__main__":
    main()
