"""`pc.label`: automatic labels for the features of a graph that have no name."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from pycircuit.graph import Graph
from pycircuit.graph.threshold import cutoff
from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops.torch_settings import without_autocast
from pycircuit.progress import Progress, Report

from .example_tokens import ExampleTokens
from .label_text import label_text
from .plain_tokens import PlainTokens
from .prompt_tokens import SHOWN, prompt_labels
from .raised_tokens import raised_tokens

Labels: TypeAlias = bool | str | os.PathLike[str]

INFLUENTIAL = 0.8  # share of the influence that is in the nodes that pruning keeps
MOST_RAISED = 1000  # features whose raised tokens are found in a trace, the most influential ones

Key = tuple[int, int]  # layer, feature


def label(
    model: ReplacementModel,
    graph: Graph,
    examples: str | os.PathLike[str] | None = None,
    *,
    progress: bool | Report = True,
) -> Graph:
    """Return the graph with an automatic label for every feature that has no name: `raises Texas, TX`, `on "capital"`.

    model: the one that was traced; names that it has for features count as names. A feature's tokens are those whose
    logits its decoder raises, unless random directions raise tokens as clearly, and those it is most active on in the
    texts of `examples`, a folder of pc.write_examples, or without one in the prompt. What features raise is cached.
    """
    check_model("label", model)
    _check_graph(model, graph)
    source = None if examples is None else ExampleTokens("label", examples)
    active = _keys(graph)
    names = {key: model.labels[key] for key in active if key in model.labels} | graph.labels
    named = replace(graph, labels=names, automatic_labels={})
    with closing(Progress(progress)) as progress_line:
        texts = _labels(model, named, [key for key in active if key not in names], source, progress_line)
    named.automatic_labels.update(texts)
    return named


def add_labels(model: ReplacementModel, graph: Graph, labels: Labels, progress: Progress) -> None:
    """Add automatic labels to a graph that was traced a moment ago.

    The tokens raised are found for its most influential features; the others are named after the prompt alone.
    """
    if labels is False:
        return
    source = None if labels is True else ExampleTokens("attribute", labels)
    chosen = [key for key in _influential(graph) if key not in graph.labels]
    graph.automatic_labels.update(_labels(model, graph, chosen[:MOST_RAISED], source, progress))


def check_labels(op: str, labels: Labels) -> None:
    """Raise unless labels are True, False or a folder of examples."""
    if not isinstance(labels, bool | str | os.PathLike):
        raise TypeError(f"{op}: labels must be True, False or a folder of examples, got {type(labels).__name__}")
    if not isinstance(labels, bool):
        ExampleTokens(op, labels)


def _check_graph(model: ReplacementModel, graph: Graph) -> None:
    if not isinstance(graph, Graph):
        raise TypeError(f"label: graph must be a pc.Graph, got {type(graph).__name__}")
    vocabulary = len(model.weights.unembedding)
    if graph.layers != model.depth or graph.vocab_size not in (0, vocabulary):
        raise ValueError(
            f"label: graph must be of the model, which has {model.depth} layers and {vocabulary} tokens, got one of "
            f"{graph.layers} layers and {graph.vocab_size} tokens"
        )
    for layer, feature in _keys(graph):
        if feature >= model.transcoders.size(layer):
            raise ValueError(
                f"label: graph must be of the model, whose layer {layer} has {model.transcoders.size(layer)} "
                f"features, got feature {feature}"
            )


def _keys(graph: Graph) -> list[Key]:
    """(layer, feature) of the graph's features, ascending."""
    return [(layer, feature) for layer, feature in np.unique(graph.features.numpy()[:, [0, 2]], axis=0).tolist()]


def _influential(graph: Graph) -> list[Key]:
    """(layer, feature) of the features that pruning would keep by their influence, the most influential first."""
    influence = graph.influence().numpy()
    least = cutoff(influence, INFLUENTIAL)
    own = influence[: graph.first_error]
    nodes = np.argsort(-own, kind="stable")[: int((own >= least).sum())]
    return list(dict.fromkeys((layer, feature) for layer, _, feature in graph.features.numpy()[nodes].tolist()))


@without_autocast()
def _labels(
    model: ReplacementModel, graph: Graph, chosen: list[Key], source: ExampleTokens | None, progress: Progress
) -> dict[Key, str]:
    """Labels of all features without a name. chosen: those whose raised tokens are found."""
    plain = PlainTokens(model.tokenizer, model.weights.vocabulary)
    raised: dict[Key, list[int]] = {}
    if chosen:
        entries, clear = raised_tokens(model, np.array(chosen, np.int64), progress)
        keys = zip(entries.layer.tolist(), entries.feature.tolist(), strict=True)
        tokens = zip(keys, entries.tokens.tolist(), (entries.score > clear).tolist(), strict=True)
        raised = {key: ids if clearly else [] for key, ids, clearly in tokens}
    result = {}
    for key, on_prompt, everywhere in prompt_labels(graph, plain):
        if key in graph.labels:
            continue
        text = on_prompt
        if key in raised:
            up = plain.distinct(raised[key], SHOWN)
            read = None if source is None else source.active(*key)
            if read is not None:
                text = label_text(up, *read)
            elif up:  # the prompt's own tokens say little beside those raised, and its length is no text's
                text = label_text(up, [], everywhere)
        if text:
            result[key] = text
    return result
