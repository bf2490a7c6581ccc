"""Labels of features by the tokens of the prompt that they are most active on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pycircuit.graph import Graph

from .label_text import label_text
from .plain_tokens import PlainTokens

SHOWN = 3  # tokens of a kind, at the most
_SHARE = 0.5  # of a feature's largest activation, which a token must have to be named beside the first
_MOST, _FEWEST = 2 / 3, 8  # share of the positions that are most tokens, and the length from which on it says something


def prompt_labels(graph: Graph, plain: PlainTokens) -> Iterator[tuple[tuple[int, int], str, bool]]:
    """Yield ((layer, feature), its label after the prompt, True if it is active on most tokens).

    A prompt has few tokens and a graph many features, so a label is written once for all that have it.
    """
    if not len(graph.features):
        return
    layer, position, feature = graph.features.numpy().T
    value = graph.values.numpy()
    order = np.lexsort((position, -value, feature, layer))
    layer, position, feature, value = layer[order], position[order], feature[order], value[order]
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(layer) != 0) | (np.diff(feature) != 0)
    starts, group = np.flatnonzero(new), np.cumsum(new) - 1
    most = _MOST * graph.positions if graph.positions >= _FEWEST else np.inf
    everywhere = np.bincount(group) > most
    strong = (value >= _SHARE * value[starts][group]) | new
    texts, shown = _shown(group[strong], position[strong], len(starts), [plain(t) for t in graph.tokens.ids.tolist()])
    _, first, kind = np.unique(_code(shown, len(texts)) * 2 + everywhere, return_index=True, return_inverse=True)
    labels = [
        label_text([], [texts[text] for text in shown[i].tolist() if text >= 0], bool(everywhere[i])) for i in first
    ]
    keys = zip(layer[starts].tolist(), feature[starts].tolist(), strict=True)
    yield from zip(keys, [labels[i] for i in kind.tolist()], everywhere.tolist(), strict=True)


def _shown(group: np.ndarray, position: np.ndarray, groups: int, tokens: list[str]) -> tuple[list[str], np.ndarray]:
    """Distinct texts, and for every group the first SHOWN of its own that differ in more than case: [groups, SHOWN].

    group, position: a feature's positions from the most active down; tokens: texts by position. -1 is no text.
    """
    texts = list(dict.fromkeys(tokens))
    text_of = {text: i for i, text in enumerate(texts)}
    text = np.array([text_of[token] if token else -1 for token in tokens])[position]
    group, text = group[text >= 0], text[text >= 0]
    folded = np.unique([PlainTokens.folded(t) for t in texts], return_inverse=True)[1]
    first_ones = np.sort(np.unique(group * len(texts) + folded[text], return_index=True)[1])  # the first of each
    group, text = group[first_ones], text[first_ones]
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    shown = np.full((groups, SHOWN), -1)
    near = rank < SHOWN
    shown[group[near], rank[near]] = text[near]
    return texts, shown


def _code(shown: np.ndarray, texts: int) -> np.ndarray:
    """One number for every row of texts."""
    code = np.zeros(len(shown), np.int64)
    for column in shown.T:
        code = code * (texts + 1) + column + 1
    return code
