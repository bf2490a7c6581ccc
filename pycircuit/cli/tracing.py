"""`pycircuit attribute` and `pycircuit estimate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.markup import escape

import pycircuit as pc
from pycircuit.command_interrupt import Stopped
from pycircuit.graph.io.page_metadata import FLAVOURS, Flavour
from pycircuit.graph.prune import Pruned, thresholds
from pycircuit.graph.show.notebook import strongest_features
from pycircuit.trace.precision import PRECISIONS, Precision

from .console import console, emit, table
from .options import (
    AsJson,
    Ids,
    Opening,
    Prompt,
    PromptList,
    Prompts,
    Quiet,
    Running,
    check_new_file,
    check_output_folder,
    completions,
    parse_targets,
)
from .texts import Text

STRONGEST = 10  # features listed
ENDINGS = (".safetensors", ".json", ".svg")  # of --save, --to-json and --plot

MaxFeatures = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|all",
        help="Features with a row of their own, the most influential ones.",
        show_default="4096, or fewer in about 5 minutes and the memory",
        autocompletion=completions("all"),
    ),
]
MaxTargets = Annotated[int, typer.Option(help="Likeliest next tokens, at most.")]
Memory = Annotated[
    str | None,
    typer.Option(help="Memory of the trace beside the model, as in 8GiB.", show_default="most of what is free"),
]

SweepPrecision = Annotated[
    str,
    typer.Option(
        help=" | ".join(PRECISIONS) + ", of the sweep's products; tf32 on a GPU only.",
        autocompletion=completions(*PRECISIONS),
    ),
]


@dataclass(frozen=True)
class Tracing:
    """Targets of a trace, and its bounds."""

    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="The text of a token, id:8941, or a feature as 3/5/412; or several.",
            show_default="the likeliest",
        ),
    ] = None
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="The text of a token or id:8941; or several: the difference of the mean logit of every --target and "
            "theirs is the one target.",
        ),
    ] = None
    position: Annotated[
        list[int] | None, typer.Option(help="Where outputs are read; or several.", show_default="the last")
    ] = None
    probability: Annotated[float, typer.Option(help="Of the traced next tokens, together.")] = 0.95
    max_targets: MaxTargets = 10
    max_features: MaxFeatures = None
    memory: Memory = None
    round_size: Annotated[
        int | None, typer.Option(help="Features chosen at a time.", show_default="an eighth of --max-features")
    ] = None
    precision: SweepPrecision = "float32"

    def arguments(self) -> dict[str, Any]:
        """Arguments of pc.attribute."""
        return {
            "targets": parse_targets(self.targets or [], self.against or []),
            "position": self.position or -1,
            "probability": self.probability,
            "max_targets": self.max_targets,
            "max_features": parse_feature_count(self.max_features),
            "memory": self.memory,
            "round_size": self.round_size,
            "precision": self.precision,
        }


def parse_feature_count(text: str | None) -> int | Literal["all"] | None:
    """Parse --max-features: a number, or all."""
    if text is None or text == "all":
        return None if text is None else "all"
    if not text.isdecimal():
        raise ValueError(f"--max-features must be a number from 0, or all, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class Labelling:
    """Automatic labels of the features without a name."""

    labels: Annotated[
        Path | None,
        typer.Option(
            help="A folder of `pycircuit examples`: features are labelled by its texts.", show_default="the prompt"
        ),
    ] = None
    no_labels: Annotated[bool, typer.Option("--no-labels", help="No automatic labels.")] = False

    def argument(self) -> bool | Path:
        """Argument of pc.attribute."""
        if self.labels is not None and self.no_labels:
            raise ValueError("one of --labels and --no-labels must be given, got both")
        return not self.no_labels if self.labels is None else self.labels


@dataclass(frozen=True)
class Outputs:
    """Files of a graph, its pruning, and the tree on the terminal."""

    save: Annotated[Path | None, typer.Option(help="The whole graph, as safetensors.")] = None
    to_json: Annotated[Path | None, typer.Option(help="The pruned graph, for a page: see --flavour.")] = None
    plot: Annotated[Path | None, typer.Option(help="The pruned graph, as SVG.")] = None
    flavour: Annotated[
        str, typer.Option(help=" | ".join(FLAVOURS) + ", of --to-json.", autocompletion=completions(*FLAVOURS))
    ] = FLAVOURS[0]
    slug: Annotated[str | None, typer.Option(help="The graph's name on the page.", show_default="the file's")] = None
    scan: Annotated[
        str | None,
        typer.Option(help="The set of transcoders, for the page's labels, or Neuronpedia's id of the model."),
    ] = None
    node_threshold: Annotated[float, typer.Option(help="Share of the influence in the nodes that pruning keeps.")] = 0.8
    edge_threshold: Annotated[float, typer.Option(help="Share of the influence in the edges that pruning keeps.")] = (
        0.98
    )

    depth: Annotated[int, typer.Option(help="Levels of the tree on the terminal.", min=1)] = 5
    branches: Annotated[int, typer.Option(help="Inputs of a node shown in it, at most.", min=1)] = 4
    lines: Annotated[int, typer.Option(help="Lines of it, at most; the most important nodes unfold first.", min=1)] = 40
    errors: Annotated[
        bool, typer.Option("--errors/--no-errors", help="Errors of every node in tree and picture, summed up.")
    ] = False
    group: Annotated[
        bool, typer.Option("--group/--no-group", help="Features of one label and position as one, in both.")
    ] = True

    def check(self, many: bool) -> None:
        """Refuse paths that cannot be written, before anything is computed. many: the paths are folders."""
        thresholds("attribute", self.node_threshold, self.edge_threshold)
        if self.flavour not in FLAVOURS:
            raise ValueError(f"--flavour must be one of {', '.join(FLAVOURS)}, got {self.flavour!r}")
        if many and self.slug:
            raise ValueError(
                "--slug must name one graph, got --prompts; graphs are named after the line of their prompt"
            )
        paths = {"--save": self.save, "--to-json": self.to_json, "--plot": self.plot}
        for (name, path), ending in zip(paths.items(), ENDINGS, strict=True):
            if path is not None and many:
                check_output_folder(name, path)
            elif path is not None:
                check_new_file(name, path, ending)

    def write(self, graph: pc.Graph, number: int | None) -> dict[str, str]:
        """Write the files of a graph and return their paths by option. number: the prompt's line, of many."""
        written = {}
        if self.save is not None:
            path = _file(self.save, number, ENDINGS[0])
            graph.save(path)
            written["save"] = str(path)
        if self.to_json is not None:
            path = _file(self.to_json, number, ENDINGS[1])
            limits = self.node_threshold, self.edge_threshold
            graph.to_json(path, self.slug, *limits, self.scan, flavour=cast(Flavour, self.flavour))
            written["to_json"] = str(path)
        if self.plot is not None:
            path = _file(self.plot, number, ENDINGS[2])
            graph.plot(path, self.node_threshold, self.edge_threshold, group=self.group, errors=self.errors)
            written["plot"] = str(path)
        return written

    def tree(self, graph: pc.Graph, target: int) -> str:
        """Tree of a target."""
        return graph.tree(target, self.depth, self.branches, errors=self.errors, group=self.group, max_lines=self.lines)


def _file(path: Path, number: int | None, ending: str) -> Path:
    return path if number is None else path / f"{number:04d}{ending}"


def attribute(
    opening: Opening,
    prompt: Prompt = None,
    prompts: Prompts = None,
    ids: Ids = False,
    *,
    tracing: Tracing,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder; after a stop the same command continues from it.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Prompts of --prompts traced at a time.", min=1)] = None,
    labelling: Labelling,
    outputs: Outputs,
    running: Running,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Trace the graph of a prompt: direct effects of features, error nodes and tokens on logits and features.

    With --prompts, the paths of --save, --to-json and --plot are folders, and a graph's files are named after the line
    of its prompt: 0003.svg is the third line's, blank lines counted.
    """
    prompt_list = PromptList.of(prompt, prompts, ids)
    arguments = {**tracing.arguments(), "labels": labelling.argument()}
    outputs.check(prompt_list.from_file)
    every_target = bool(tracing.targets)
    if prompt_list.from_file and checkpoint is not None:
        raise ValueError("--checkpoint must go with one PROMPT, got --prompts")
    with opening.opened(running) as model:
        prompt_list.check(model)
        texts = prompt_list.texts
        if not prompt_list.from_file:
            graph = pc.attribute(model, texts[0], checkpoint=checkpoint, progress=not quiet, **arguments)
            _report(texts[0], graph, outputs, None, as_json, every_target)
            if graph.provenance["interrupted"]:
                advice = "" if checkpoint is None else f"; the same command goes on from {checkpoint}"
                raise Stopped(f"the graph has the rows found so far{advice}")
            return
        graphs = pc.attribute_many(model, texts, workers=workers, progress=not quiet, **arguments)
        for number, text, graph in zip(prompt_list.numbers, texts, graphs, strict=True):
            _report(text, graph, outputs, number, as_json, every_target)


def _report(
    prompt: Text, graph: pc.Graph, outputs: Outputs, line: int | None, as_json: bool, every_target: bool
) -> None:
    """Write the files of a graph and print its trees, or a line of JSON.

    line: the prompt's line, of many. every_target: print a tree for each target, not only the likeliest at a position.
    """
    pruned = graph.prune(outputs.node_threshold, outputs.edge_threshold)
    written = outputs.write(graph, line)
    if as_json:
        number = {} if line is None else {"line": line}
        emit({**number, "prompt": prompt, **summary(graph, pruned), "files": written}, indent=None if number else 1)
        return
    scores, terminal = graph.scores(), console()
    positions = graph.targets.positions.tolist()
    targets = range(len(positions)) if every_target else sorted(positions.index(p) for p in set(positions))
    for i in targets:
        terminal.print(outputs.tree(graph, i), markup=False, highlight=False)
    _print_strongest(terminal, pruned)
    terminal.print(
        f"{len(graph.features)} features, {graph.rows.count} rows{_limit(graph)}, {graph.rows.entries} edges; "
        f"pruned to {int(pruned.node_mask.sum())} nodes and {int(pruned.edge_mask.sum())} edges; replacement score "
        f"{scores.replacement:.3f}, completeness {scores.completeness:.3f}; law {graph.certificate:.1e} off; "
        f"{sum(graph.timings.values()):.2f} s",
        highlight=False,
    )
    for path in written.values():
        terminal.print(path, markup=False, highlight=False)


def _print_strongest(terminal: Console, pruned: Pruned) -> None:
    """Print the features of most influence on the targets; nothing for a graph without features."""
    rows = table("influence", "feature", "label", "token", "activation")
    for influence, feature, label, token, value in strongest_features(pruned, STRONGEST):
        rows.add_row(*(escape(str(cell)) for cell in (influence, feature, label, token, f"{value:.3g}")))
    if rows.row_count:
        terminal.print(rows, highlight=False)


def _limit(graph: pc.Graph) -> str:
    """Say that features are without a row because nobody chose how many get one."""
    settings = graph.provenance["settings"]
    rows = len(graph.row_node) - len(graph.targets)
    chosen = settings["max_features_chosen"] or graph.provenance["interrupted"]
    return "" if chosen or rows >= len(graph.features) else " (--max-features all for the others)"


def summary(graph: pc.Graph, pruned: Pruned) -> dict[str, Any]:
    """Facts of a graph for JSON: targets, sizes, strongest features, scores, precision and timings."""
    targets = [graph.describe(graph.target_node(i)) for i in range(len(graph.targets))]
    return {
        "tokens": list(graph.tokens.text),
        "targets": targets,
        "features": len(graph.features),
        "rows": graph.rows.count,
        "edges": graph.rows.entries,
        "max_features": graph.provenance["settings"]["max_features"],
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
    """Features of most influence."""
    influence = pruned.influence[: graph.first_error]
    best = influence.topk(min(STRONGEST, len(influence)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"label": "", **graph.describe(node), "influence": share} for node, share in pairs]


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
    """Estimate memory and time of a trace without running it."""
    prompt_list = PromptList.of(prompt, prompts, ids)
    with opening.opened(running) as model:
        prompt_list.check(model)
        estimates = [
            pc.estimate(
                model,
                text,
                max_features=parse_feature_count(max_features),
                max_targets=max_targets,
                precision=cast(Precision, precision),
                memory=memory,
            )
            for text in prompt_list.texts
        ]
    if as_json:
        results = [{**asdict(estimate), "bytes": estimate.bytes} for estimate in estimates]
        emit(results if prompt_list.from_file else results[0])
        return
    terminal = console()
    for estimate in estimates:
        terminal.print(str(estimate), markup=False, highlight=False)
