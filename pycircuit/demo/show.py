"""`pycircuit demo`: a question of two hops, its circuit as a tree and a picture, and the swap that proves it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pycircuit.graph.tree import lines
from pycircuit.trace import attribute

from .box import load_box
from .facts import facts
from .swap import swap, two_hop

STYLES = {"target": "bold green", "path": "bold yellow", "token": "cyan", "error": "dim"}

if TYPE_CHECKING:
    from rich.console import Console

    from pycircuit.graph import Graph
    from pycircuit.model import ReplacementModel


def likeliest(model: ReplacementModel, probabilities: Tensor, count: int = 3) -> str:
    """`Austin 98.1%, Dallas 0.4%, ...`"""
    top = probabilities.topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return ", ".join(f"{model.tokenizer.decode(token)} {100 * share:.1f}%" for token, share in pairs)


def run(console: Console, city: str = "Dallas", other: str = "Oakland", svg: Path | None = None) -> dict[str, Any]:
    """Everything, said on the console. Both cities must be among the box's facts; svg: where the picture goes."""
    known = facts()
    for name, value in (("city", city), ("other", other)):
        if value not in known.state:
            raise ValueError(f"demo: {name} must be a city the box knows, got {value!r}")
    model = load_box()
    parameters = sum(p.numel() for p in model.hf_model.parameters())
    features = sum(model.transcoders.size(layer) for layer in range(model.depth))
    console.print(f"A Llama of {model.depth} layers and {parameters / 1e6:.1f}M parameters, {features} features.")
    prompt = two_hop(city)
    graph = attribute(model, prompt, progress=False)
    console.print(f"\n[bold]{prompt}[/bold] ...", highlight=False)
    _circuit(console, graph)
    if svg is not None:
        graph.plot(svg)
        console.print(f"\nThe picture: {svg}", highlight=False)
    return _swapped(console, model, prompt, city, other)


def _circuit(console: Console, graph: Graph) -> None:
    pruned = graph.prune()
    console.print(
        f"{len(graph.features)} active features, {graph.rows.entries} edges, every row adds up to its "
        f"pre-activation within {graph.certificate:.0e}; {pruned.graph.rows.entries} edges carry the influence.\n",
        highlight=False,
    )
    for line in lines(graph, 0, 5, 3, 0.02):
        console.print(line.text, style=STYLES.get(line.style), highlight=False, markup=False)
    console.print("weight, share of the row, feature and where it is active; ◀ the strongest path", style="dim")


def _swapped(console: Console, model: ReplacementModel, prompt: str, city: str, other: str) -> dict[str, Any]:
    known = facts()
    concept, instead = known.state[city], known.state[other]
    changes = swap(model, prompt, concept, two_hop(other), instead)
    result = model.intervene(prompt, changes, freeze="attention")
    console.print(f"\nNow {concept}'s features off and {instead}'s on ({len(changes)} of {_active(model, prompt)}):")
    console.print(f"  before  {likeliest(model, result.probabilities_before)}", highlight=False)
    console.print(f"  after   {likeliest(model, result.probabilities)}", highlight=False)
    return {
        "before": likeliest(model, result.probabilities_before, 1),
        "after": likeliest(model, result.probabilities, 1),
    }


def _active(model: ReplacementModel, prompt: str) -> int:
    return sum(features.count for features in model.activations([prompt])[0])
