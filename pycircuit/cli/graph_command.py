"""`pycircuit graph`: what a graph file holds, its pruning, scores and paths, and its conversion into other files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import pycircuit as pc
from pycircuit.graph.identifiers import identifier, node_of
from pycircuit.graph.io.open_graph import ENDINGS
from pycircuit.graph.io.page_metadata import FLAVOURS, Flavour
from pycircuit.graph.prune import Pruned, thresholds

from .console import console, emit, table
from .options import AsJson, completions

FORMATS = (*ENDINGS, ".graphml", ".svg")  # of --out; a name without an ending is a folder of tables
STRONGEST = 10  # features shown


@dataclass(frozen=True)
class Pruning:
    """Thresholds of a pruning, and what is pruned."""

    prune: Annotated[bool, typer.Option("--prune", help="Prune first; without it, .json and .svg are.")] = False
    node_threshold: Annotated[
        float | None, typer.Option(help="Of pruning.", show_default="0.8, or 1 for a .json, which is pruned")
    ] = None
    edge_threshold: Annotated[float | None, typer.Option(help="Of pruning.", show_default="0.98, or 1 for a .json")] = (
        None
    )

    def thresholds(self, file: Path) -> tuple[float, float]:
        """Both thresholds for a file: those asked for, or what the file needs."""
        node, edge = (1.0, 1.0) if file.suffix.lower() == ".json" else (0.8, 0.98)
        return thresholds(
            "graph",
            node if self.node_threshold is None else self.node_threshold,
            edge if self.edge_threshold is None else self.edge_threshold,
        )


@dataclass(frozen=True)
class Conversion:
    """Files to write, and what formats need to know."""

    out: Annotated[
        list[Path] | None,
        typer.Option(
            help=f"Convert: a file that ends in {', '.join(FORMATS)}, or a folder for Parquet tables; or several."
        ),
    ] = None
    flavour: Annotated[
        str, typer.Option(help=" | ".join(FLAVOURS) + ", of a .json.", autocompletion=completions(*FLAVOURS))
    ] = FLAVOURS[0]
    slug: Annotated[str | None, typer.Option(help="The graph's name in a .json.", show_default="the file's")] = None
    scan: Annotated[str | None, typer.Option(help="The set of transcoders, or Neuronpedia's id of the model.")] = None
    source_set: Annotated[str | None, typer.Option(help="Neuronpedia's set of feature cards.")] = None
    tokenizer: Annotated[str | None, typer.Option(help="A folder or hub name, for the texts of a .pt.")] = None

    def check(self) -> None:
        """Refuse paths that cannot be written, before anything is read."""
        for path in self.out or []:
            if path.suffix and path.suffix.lower() not in FORMATS and not path.is_dir():
                raise ValueError(f"--out must end in {', '.join(FORMATS)}, or be a folder for tables, got {path}")
            if not path.absolute().parent.is_dir():
                raise FileNotFoundError(f"--out must be in a folder that exists, got {path}")

    def write(self, graph: pc.Graph, pruned: Pruned, limits: tuple[float, float], prune: bool) -> list[str]:
        """Write every file and return their paths.

        limits: the thresholds of pages and pictures, which are always pruned. prune: write the others pruned too.
        """
        details = None if self.source_set is None else {"neuronpedia_source_set": self.source_set}
        for path in self.out or []:
            ending = path.suffix.lower()
            if ending == ".json":
                flavour = cast(Flavour, self.flavour)
                graph.to_json(path, self.slug, *limits, self.scan, flavour=flavour, feature_details=details)
            elif ending == ".svg":
                graph.plot(path, *limits)
            else:
                self._write(pruned.graph if prune else graph, path)
        return [str(path) for path in self.out or []]

    def _write(self, graph: pc.Graph, path: Path) -> None:
        ending = path.suffix.lower()
        if ending == ".safetensors":
            graph.save(path)
        elif ending == ".pt":
            graph.to_circuit_tracer(path, tokenizer_name=self.tokenizer)
        elif ending == ".graphml":
            graph.to_graphml(path)
        else:
            graph.to_parquet(path)


def graph(
    file: Annotated[
        Path,
        typer.Argument(
            help="A graph: .safetensors, the .json of circuit-tracer's page or Neuronpedia, or circuit-tracer's .pt."
        ),
    ],
    *,
    conversion: Conversion,
    pruning: Pruning,
    paths: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Strongest paths between two nodes, such as token/7 target/0 or 0/7/20 target/0."),
    ] = None,
    k: Annotated[int, typer.Option(help="Paths shown.", min=1)] = 5,
    tree: Annotated[bool, typer.Option("--tree", help="Show the first target's strongest inputs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a graph file holds, its scores and paths, and write it in other formats."""
    conversion.check()
    loaded = pc.Graph.open(file, None if conversion.tokenizer is None else _tokenizer(conversion.tokenizer))
    limits = pruning.thresholds(file)
    pruned = loaded.prune(*limits)
    shown = pruned.graph if pruning.prune else loaded
    facts = {"file": str(file), **_facts(shown)}
    facts["pruned"] = {"nodes": int(pruned.node_mask.sum()), "edges": int(pruned.edge_mask.sum())}
    if paths is not None:
        facts["paths"] = _paths(shown, *paths, k)
    facts["files"] = conversion.write(loaded, pruned, limits, pruning.prune)
    if as_json:
        emit(facts)
    else:
        _print(facts, shown if tree else None)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _facts(graph: pc.Graph) -> dict[str, Any]:
    """Facts of a graph for JSON."""
    influence = graph.influence()[: graph.first_error]
    best = influence.topk(min(STRONGEST, len(influence)))
    return {
        "prompt": graph.prompt,
        "tokens": list(graph.tokens.text),
        "layers": graph.layers,
        "targets": [graph.describe(graph.target_node(i)) for i in range(len(graph.targets))],
        "nodes": graph.nodes,
        "features": len(graph.features),
        "rows": graph.rows.count,
        "edges": graph.rows.entries,
        "scores": graph.scores()._asdict(),
        "certificate": graph.certificate,
        "provenance": graph.provenance,
        "strongest": [
            {"id": identifier(graph, node), "label": "", **graph.describe(node), "influence": share}
            for node, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
    }


def _paths(graph: pc.Graph, source: str, target: str, k: int) -> list[dict[str, Any]]:
    first, last = (node_of(graph, text, "--paths") for text in (source, target))
    return [
        {
            "nodes": [{"id": identifier(graph, node), "label": "", **graph.describe(node)} for node in path.nodes],
            "weights": list(path.weights),
            "strength": path.strength,
        }
        for path in graph.paths(first, last, k)
    ]


def _print(facts: dict[str, Any], tree: pc.Graph | None) -> None:
    terminal = console()

    def line(text: str) -> None:
        terminal.print(text, markup=False, highlight=False)

    certificate = facts["certificate"]
    law = (
        "law unknown (the file has no pre-activations)" if certificate != certificate else f"law {certificate:.1e} off"
    )
    line(f"{facts['prompt']!r}: {len(facts['tokens'])} tokens, {facts['layers']} layers")
    for target in facts["targets"]:
        line(f"target {target['label']!r} at {target['position']}, weight {target['weight']:.3f}")
    line(
        f"{facts['features']} features, {facts['rows']} rows, {facts['edges']} edges; pruned to "
        f"{facts['pruned']['nodes']} nodes and {facts['pruned']['edges']} edges; replacement score "
        f"{facts['scores']['replacement']:.3f}, completeness {facts['scores']['completeness']:.3f}; {law}"
    )
    strongest = table("feature", "label", "value", "influence")
    for feature in facts["strongest"]:
        strongest.add_row(feature["id"], feature["label"], f"{feature['value']:.3f}", f"{feature['influence']:.4f}")
    terminal.print(strongest, markup=False, highlight=False)
    for path in facts.get("paths", []):
        names = " -> ".join(f"{node['label']} {node['id']}".strip() for node in path["nodes"])
        line(f"{path['strength']:.2g}  {names}  ({', '.join(f'{weight:+.3g}' for weight in path['weights'])})")
    if tree is not None:
        line(tree.tree())
    for path in facts["files"]:
        line(path)
