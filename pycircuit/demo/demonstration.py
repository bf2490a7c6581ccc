"""`pycircuit demo`: a question of two hops, its circuit as a tree and a picture, and a test of it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pycircuit.graph.show.tree import lines
from pycircuit.interventions import intervene
from pycircuit.trace import attribute

from .demo_model import load_demo
from .facts import facts
from .swap import swap, two_hop

STYLES = {"target": "bold green", "path": "bold yellow", "token": "cyan", "error": "dim"}

if TYPE_CHECKING:
    from rich.console import Console

    from pycircuit.graph import Graph
    from pycircuit.model import ReplacementModel


def likeliest(model: ReplacementModel, probabilities: Tensor, count: int = 3) -> str:
    """Format the likeliest tokens: `Austin 98.1%, Dallas 0.4%, ...`."""
    top = probabilities.topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return ", ".join(f"{model.tokenizer.decode(token)} {100 * share:.1f}%" for token, share in pairs)


def run(console: Console, city: str = "Dallas", other: str = "Oakland", svg: Path | None = None) -> dict[str, Any]:
    """Run the demonstration on a console. city, other: cities of the demo's facts; svg: path of the picture."""
    state = facts().state
    for name, value in (("city", city), ("other", other)):
        if value not in state:
            raise ValueError(f"demo: {name} must be a city the model knows, got {value!r}{_suggestion(value, state)}")
    if state[city] == state[other]:
        raise ValueError(f"demo: other must be a city outside {state[city]}, got {other!r}")
    model = load_demo()
    parameters = sum(p.numel() for p in model.hf_model.parameters())
    features = sum(model.transcoders.size(layer) for layer in range(model.depth))
    console.print(f"A Llama of {model.depth} layers and {parameters / 1e6:.1f}M parameters, {features} features.")
    prompt = two_hop(city)
    graph = attribute(model, prompt, progress=False)
    console.print(f"\n[bold]{prompt}[/bold] ...", highlight=False)
    _print_circuit(console, graph)
    if svg is not None:
        graph.plot(svg)
        console.print(f"\nThe picture: {svg}", highlight=False)
    swapped = _print_swap(console, model, city, other)
    return {"prompt": prompt, "answer": graph.targets.labels[0], "swapped": swapped, "certificate": graph.certificate}


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, 3)
    return f"; it knows {', '.join(close)}" if close else ""


def _print_circuit(console: Console, graph: Graph) -> None:
    pruned = graph.prune()
    console.print(
        f"{len(graph.features)} active features, {graph.rows.entries} edges, every row adds up to its "
        f"pre-activation within {graph.certificate:.0e}; {pruned.graph.rows.entries} edges carry the influence.\n",
        highlight=False,
    )
    for line in lines(graph):
        console.print(line.text, style=STYLES.get(line.style), highlight=False, markup=False)
    console.print("weight, share of the row, feature and where it is active; ◀ the strongest path", style="dim")


def _print_swap(console: Console, model: ReplacementModel, city: str, other: str) -> str:
    """Turn the features of the city's state off and those of the other city's on; return the answer."""
    state, other_state = facts().state[city], facts().state[other]
    changes = swap(model, two_hop(city), state, two_hop(other), other_state)
    if not changes:
        raise ValueError(f"demo: {city} and {other} must make features of their states active, got none of them")
    result = intervene(model, two_hop(city), changes, freeze="none")
    off = sum(change.value == 0 for change in changes)
    on = f"{len(changes) - off} called {other_state} on, as strong as for {other}"
    console.print(f"\nThe {off} features called {state} off, {on}; everything else runs:", highlight=False)
    console.print(f"  before  {likeliest(model, result.probabilities_before)}", highlight=False)
    console.print(f"  after   {likeliest(model, result.probabilities)}", highlight=False)
    return model.tokenizer.decode(int(result.probabilities.argmax()))
