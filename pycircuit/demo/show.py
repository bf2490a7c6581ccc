"""`pycircuit demo`: a question of two hops, its circuit as a tree and a picture, and a test of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pycircuit.graph.tree import lines
from pycircuit.trace import attribute

from .box import load_box
from .facts import TWO_HOP, facts

ABLATED = 8
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


def run(console: Console, city: str = "Dallas", svg: Path | None = None) -> dict[str, Any]:
    """Everything, said on the console. city: one of the box's facts; svg: where the picture goes."""
    if city not in facts().state:
        raise ValueError(f"demo: city must be a city the box knows, got {city!r}")
    model = load_box()
    parameters = sum(p.numel() for p in model.hf_model.parameters())
    features = sum(model.transcoders.size(layer) for layer in range(model.depth))
    console.print(f"A Llama of {model.depth} layers and {parameters / 1e6:.1f}M parameters, {features} features.")
    prompt = TWO_HOP.format(city)
    graph = attribute(model, prompt, progress=False)
    console.print(f"\n[bold]{prompt}[/bold] ...", highlight=False)
    _circuit(console, graph)
    if svg is not None:
        graph.plot(svg)
        console.print(f"\nThe picture: {svg}", highlight=False)
    _ablated(console, model, graph)
    return {"prompt": prompt, "answer": graph.targets.labels[0], "certificate": graph.certificate}


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


def _ablated(console: Console, model: ReplacementModel, graph: Graph) -> None:
    """The most influential features of the last position off, and what is said then."""
    from pycircuit.causal import Intervention

    last = graph.positions - 1
    influence = graph.influence()[: graph.first_error].masked_fill(graph.features[:, 1] != last, 0)
    chosen = graph.features[influence.topk(min(ABLATED, len(influence))).indices].tolist()
    result = model.intervene(
        graph.tokens.ids, [Intervention(layer, p, f, value=0.0) for layer, p, f in chosen], freeze="none"
    )
    console.print(f"\nThe {len(chosen)} most influential features of the last token off, all else runs:")
    console.print(f"  before  {likeliest(model, result.probabilities_before)}", highlight=False)
    console.print(f"  after   {likeliest(model, result.probabilities)}", highlight=False)
