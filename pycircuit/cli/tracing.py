"""`pycircuit attribute` and `pycircuit estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import pycircuit as pc
from pycircuit.graph.prune import Pruned, thresholds
from pycircuit.trace.precision import PRECISIONS, Precision

from .console import console, emit
from .options import (
    AsJson,
    Ids,
    Opening,
    Prompt,
    Prompts,
    Quiet,
    Running,
    Stopped,
    among,
    folder_of_files,
    new_file,
    prompts_of,
    target,
)

STRONGEST = 10  # features named in the JSON
ENDINGS = (".safetensors", ".json", ".svg")  # of --save, --to-json and --plot

MaxFeatures = Annotated[
    int | None, typer.Option(help="Features with a row of their own, the most influential ones.", show_default="all")
]
MaxTargets = Annotated[int, typer.Option(help="Likeliest next tokens, at the most.")]
Memory = Annotated[
    str | None,
    typer.Option(help="What the trace may take beside the model, as in 8GiB.", show_default="most of what is free"),
]

SweepPrecision = Annotated[
    str,
    typer.Option(
        help=" | ".join(PRECISIONS) + ", of the sweep's products; tf32 on a GPU only.",
        autocompletion=among(*PRECISIONS),
    ),
]


@dataclass(frozen=True)
class Tracing:
    """What is traced, and within which bounds."""

    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="The text of a token, id:8941, or a feature as 3/5/412; or several.",
            show_default="the likeliest",
        ),
    ] = None
    position: Annotated[
        list[int] | None, typer.Option(help="Where outputs are read; or several.", show_default="the last")
    ] = None
    probability: Annotated[float, typer.Option(help="Of the likeliest next tokens that are traced, together.")] = 0.95
    max_targets: MaxTargets = 10
    max_features: MaxFeatures = None
    memory: Memory = None
    round_size: Annotated[
        int | None, typer.Option(help="Features chosen at a time.", show_default="an eighth of --max-features")
    ] = None
    precision: SweepPrecision = "float32"

    def arguments(self) -> dict[str, Any]:
        """Of pc.attribute."""
        return {
            "targets": [target(given) for given in self.targets] if self.targets else None,
            "position": self.position or -1,
            "probability": self.probability,
            "max_targets": self.max_targets,
            "max_features": self.max_features,
            "memory": self.memory,
            "round_size": self.round_size,
            "precision": self.precision,
        }


@dataclass(frozen=True)
class Outputs:
    """What becomes of a graph."""

    save: Annotated[Path | None, typer.Option(help="The whole graph, as safetensors.")] = None
    to_json: Annotated[Path | None, typer.Option(help="The pruned graph, for circuit-tracer's page.")] = None
    plot: Annotated[Path | None, typer.Option(help="The pruned graph, as SVG.")] = None
    slug: Annotated[str | None, typer.Option(help="The graph's name on the page.", show_default="the file's")] = None
    scan: Annotated[str | None, typer.Option(help="The set of transcoders, for the page's labels.")] = None
    node_threshold: Annotated[float, typer.Option(help="Share of the influence in the nodes that are kept.")] = 0.8
    edge_threshold: Annotated[float, typer.Option(help="Share of the influence in the edges that are kept.")] = 0.98

    depth: Annotated[int, typer.Option(help="Levels of the tree on the terminal.", min=1)] = 5
    branches: Annotated[int, typer.Option(help="Inputs of a node shown in it.", min=1)] = 3

    def check(self, many: bool) -> None:
        """Before anything is computed. many: the paths are folders."""
        thresholds("attribute", self.node_threshold, self.edge_threshold)
        if many and self.slug:
            raise ValueError("--slug must name one graph, got --prompts; each is named after its number")
        paths = {"--save": self.save, "--to-json": self.to_json, "--plot": self.plot}
        for (name, path), ending in zip(paths.items(), ENDINGS, strict=True):
            if path is not None and many:
                folder_of_files(name, path)
            elif path is not None:
                new_file(name, path, ending)

    def write(self, graph: pc.Graph, number: int | None) -> dict[str, str]:
        """The files by what they are. number: of many graphs."""
        written = {}
        if self.save is not None:
            graph.save(path := _file(self.save, number, ENDINGS[0]))
            written["save"] = str(path)
        if self.to_json is not None:
            path = _file(self.to_json, number, ENDINGS[1])
            graph.to_json(path, self.slug, self.node_threshold, self.edge_threshold, self.scan)
            written["to_json"] = str(path)
        if self.plot is not None:
            path = _file(self.plot, number, ENDINGS[2])
            graph.plot(path, self.node_threshold, self.edge_threshold)
            written["plot"] = str(path)
        return written


def _file(path: Path, number: int | None, ending: str) -> Path:
    return path if number is None else path / f"{number:04d}{ending}"


def attribute(
    opening: Opening,
    prompt: Prompt = None,
    prompts: Prompts = None,
    ids: Ids = False,
    *,
    tracing: Tracing,
    checkpoint: Annotated[Path | None, typer.Option(help="A folder; the same command goes on from there.")] = None,
    workers: Annotated[int | None, typer.Option(help="Of many prompts, those traced at a time.", min=1)] = None,
    outputs: Outputs,
    running: Running,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The graph of a prompt: what each feature, error and token does to the next token and to other features.

    With --prompts, the paths of --save, --to-json and --plot are folders.
    """
    asked, arguments, many = prompts_of(prompt, prompts, ids), tracing.arguments(), prompts is not None
    outputs.check(many)
    whole = bool(tracing.targets)
    if many and checkpoint is not None:
        raise ValueError("--checkpoint must go with one PROMPT, got --prompts")
    with opening.opened(running) as model:
        if not many:
            graph = pc.attribute(model, asked[0], checkpoint=checkpoint, progress=not quiet, **arguments)
            _report(asked[0], graph, outputs, None, as_json, whole)
            if graph.provenance["interrupted"]:
                goes_on = "" if checkpoint is None else f"; the same command goes on from {checkpoint}"
                raise Stopped(f"the graph has the rows found so far{goes_on}")
            return
        graphs = pc.attribute_many(model, asked, workers=workers, progress=not quiet, **arguments)
        for number, (text, graph) in enumerate(zip(asked, graphs, strict=True), 1):
            _report(text, graph, outputs, number, as_json, whole)


def _report(prompt: Any, graph: pc.Graph, outputs: Outputs, number: int | None, as_json: bool, whole: bool) -> None:
    """One graph: its files, then its trees or one line of JSON. whole: every target has a tree, which were asked for;
    otherwise the likeliest at each position."""
    pruned = graph.prune(outputs.node_threshold, outputs.edge_threshold)
    written = outputs.write(graph, number)
    if as_json:
        emit({"prompt": prompt, **summary(graph, pruned), "files": written}, indent=None if number else 1)
        return
    scores, show = graph.scores(), console()
    places = graph.targets.positions.tolist()
    shown = range(len(places)) if whole else sorted(places.index(p) for p in set(places))
    for i in shown:
        show.print(graph.tree(i, outputs.depth, outputs.branches), markup=False, highlight=False)
    show.print(
        f"{len(graph.features)} features, {graph.rows.count} rows, {graph.rows.entries} edges; pruned to "
        f"{int(pruned.node_mask.sum())} nodes and {int(pruned.edge_mask.sum())} edges; replacement score "
        f"{scores.replacement:.3f}, completeness {scores.completeness:.3f}; law {graph.certificate:.1e} off; "
        f"{sum(graph.timings.values()):.2f} s",
        highlight=False,
    )
    for path in written.values():
        show.print(path, markup=False, highlight=False)


def summary(graph: pc.Graph, pruned: Pruned) -> dict[str, Any]:
    """What a script asks of a graph first."""
    targets = [graph.describe(graph.target_node(i)) for i in range(len(graph.targets))]
    return {
        "tokens": list(graph.tokens.text),
        "targets": targets,
        "features": len(graph.features),
        "rows": graph.rows.count,
        "edges": graph.rows.entries,
        "pruned": {"nodes": int(pruned.node_mask.sum()), "edges": int(pruned.edge_mask.sum())},
        "strongest": _strongest(graph, pruned),
        "scores": graph.scores()._asdict(),
        "certificate": graph.certificate,
        "precision": graph.provenance["precision"],
        "tolerance": graph.provenance["tolerance"],
        "timings": graph.timings,
        "interrupted": bool(graph.provenance["interrupted"]),
    }


def _strongest(graph: pc.Graph, pruned: Pruned) -> list[dict[str, Any]]:
    """The features of most influence."""
    influence = pruned.influence[: graph.first_error]
    best = influence.topk(min(STRONGEST, len(influence)))
    found = []
    for node, share in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        about = graph.describe(node)
        found.append({"label": "", **about, "influence": share})
    return found


def estimate(
    opening: Opening,
    prompt: Prompt = None,
    prompts: Prompts = None,
    ids: Ids = False,
    max_features: MaxFeatures = None,
    memory: Memory = None,
    max_targets: MaxTargets = 10,
    precision: SweepPrecision = "float32",
    *,
    running: Running,
    as_json: AsJson = False,
) -> None:
    """Memory and time of a trace before any of it is spent."""
    texts = prompts_of(prompt, prompts, ids)
    with opening.opened(running) as model:
        estimates = [
            pc.estimate(
                model,
                text,
                max_features=max_features,
                max_targets=max_targets,
                precision=cast(Precision, precision),
                memory=memory,
            )
            for text in texts
        ]
    if as_json:
        written = [{**asdict(estimated), "bytes": estimated.bytes} for estimated in estimates]
        emit(written if prompts is not None else written[0])
        return
    _print(estimates)


def _print(estimates: Sequence[pc.Estimate]) -> None:
    show = console()
    for estimated in estimates:
        show.print(str(estimated), markup=False, highlight=False)
