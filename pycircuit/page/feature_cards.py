"""The card of a feature: label, activity in the prompt and in texts, histogram, tokens raised and lowered."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
import torch

from pycircuit.labels.output_tokens import OutputTokens
from pycircuit.model.frozen import unembed

from .card_examples import Examples
from .graph_index import GraphIndex, significant
from .served_model import ServedModel

OP = "page"
_LOGITS = 10  # tokens raised, and lowered
_MOST_EXAMPLES, _MOST_TOKENS, _MOST_BINS = 60, 400, 1000


def feature_card(
    layer: int,
    feature: int,
    index: GraphIndex | None,
    served: ServedModel | None,
    examples: Examples | None,
    labels: Mapping[str, str],
) -> dict[str, Any]:
    """Return what is known of a feature. index: of the graph on the page; labels: the user's own, by layer/feature."""
    if served is not None:
        _require_feature(served, layer, feature)
    content = None if examples is None else examples.content(layer, feature)
    label, automatic = _label(layer, feature, index, served, content, labels)
    raised, lowered = _output_tokens(layer, feature, served, content)
    return {
        "layer": layer, "feature": feature, "label": label, "automatic": automatic,
        "here": [] if index is None else _in_prompt(index, layer, feature),
        "raised": raised, "lowered": lowered,
        "examples": [] if content is None else _examples(content),
        "histogram": None if content is None else _histogram(content),
        "density": None if examples is None else examples.density(layer, feature),
    }  # fmt: skip


def _require_feature(served: ServedModel, layer: int, feature: int) -> None:
    depth = served.model.depth
    if layer >= depth or feature >= served.model.transcoders.size(layer):
        raise KeyError(f"{OP}: a feature must be one of the served model's, got {layer}/{feature}")


def _label(
    layer: int,
    feature: int,
    index: GraphIndex | None,
    served: ServedModel | None,
    content: dict[str, Any] | None,
    labels: Mapping[str, str],
) -> tuple[str, bool]:
    """Return the label, and True if nobody wrote it: the user's own first, then the graph's, model's and file's."""
    own = labels.get(f"{layer}/{feature}")
    if own is not None:
        return own, False
    text, automatic = ("", False) if index is None else index.graph.label(layer, feature)
    if text and not automatic:
        return text, False
    name = "" if served is None else served.model.labels.get((layer, feature), "")
    written = str(content.get("label") or "") if content else ""
    return (name or written, False) if name or written else (text, automatic)


def _in_prompt(index: GraphIndex, layer: int, feature: int) -> list[dict[str, Any]]:
    """Return the positions of the prompt where the feature is active, with its activations."""
    graph = index.graph
    own = ((graph.features[:, 0] == layer) & (graph.features[:, 2] == feature)).nonzero()[:, 0]
    values = significant(graph.values[own].numpy()).tolist()
    return [
        {"position": position, "value": value}
        for position, value in zip(graph.features[own, 1].tolist(), values, strict=True)
    ]


Tokens = list[dict[str, Any]]


def _output_tokens(
    layer: int, feature: int, served: ServedModel | None, content: dict[str, Any] | None
) -> tuple[Tokens, Tokens]:
    """Return the tokens raised and lowered most: by the model, or as the file says, without values."""
    if served is not None:
        outputs = OutputTokens(served.model, _LOGITS)
        logits = unembed(outputs.unbiased, outputs.directions(layer, torch.tensor([feature])))[0]
        logits = logits - logits.mean()
        chosen = (logits.topk(outputs.count), logits.topk(outputs.count, largest=False))
        return tuple(  # type: ignore[return-value]
            [
                {"token": served.text([token]), "value": value}
                for token, value in zip(best.indices.tolist(), significant(best.values.numpy()).tolist(), strict=True)
            ]
            for best in chosen
        )
    lists = [(content or {}).get(name) for name in ("top_logits", "bottom_logits")]
    return tuple(  # type: ignore[return-value]
        [{"token": str(token)[:200], "value": None} for token in tokens[:50]] if isinstance(tokens, list) else []
        for tokens in lists
    )


def _examples(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return examples of a file: a quantile's name, tokens, and activations; those of a wrong form are left out."""
    out = []
    for quantile in _list(content.get("examples_quantiles")):
        if not isinstance(quantile, dict):
            continue
        for example in filter(lambda example: isinstance(example, dict), _list(quantile.get("examples"))):
            tokens, values = (_list(example.get(name)) for name in ("tokens", "tokens_acts_list"))
            if example.get("is_repeated_datapoint") is True or len(tokens) != len(values):
                continue
            numbers = [_finite(value) for value in values[:_MOST_TOKENS]]
            texts = [str(token)[:200] for token in tokens[:_MOST_TOKENS]]
            peak = example.get("train_token_ind")
            peak = peak if type(peak) is int and 0 <= peak < len(texts) else int(np.argmax(numbers or [0]))
            name = str(quantile.get("quantile_name", ""))[:100]
            out.append({"quantile": name, "tokens": texts, "values": numbers, "peak": peak})
    return out[:_MOST_EXAMPLES]


def _histogram(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return edges and counts of the activations' histogram."""
    counts = [_finite(count) for count in _list(content.get("histogram"))][:_MOST_BINS]
    low, high = _finite(content.get("act_min")), _finite(content.get("act_max"))
    if not counts or not low < high:
        return None
    return {"edges": significant(np.linspace(low, high, len(counts) + 1)).tolist(), "counts": counts}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _finite(value: object) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) else 0.0
