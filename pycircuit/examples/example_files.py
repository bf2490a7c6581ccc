"""`pc.write_examples`: one file a feature, of where it is active and what it says."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pycircuit.files.atomic_folder import draft_folder, new_folder
from pycircuit.graph.io.page_json import feature_id
from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops import checks
from pycircuit.progress import Progress, Report
from pycircuit.training.sources import Texts, pieces, token_ids

from .feature import Layout, describe
from .outputs import Outputs
from .runs import Block, Runs
from .token_texts import Corpus, Words

_OP = "write_examples"
_POSITIONS = 4096  # of texts read at a time
_SCAN = re.compile(r"(?!\.)[^/\\\x00-\x1f]+")


def write_examples(
    model: ReplacementModel,
    texts: Texts,
    folder: str | os.PathLike[str],
    scan: str = "local",
    *,
    features: Any = None,
    top: int = 20,
    groups: int = 4,
    per_group: int = 5,
    around: int = 24,
    logits: int = 10,
    context: int = 256,
    progress: bool | Report = True,
) -> Path:
    """Write `folder`/features/`scan`/{id}.json for every feature, what pages show when a node of a graph is chosen.

    texts: strings or token ids, cut to the context as in training. folder: where the graphs' JSON is, or will be; the
    id is that of the node there. features: pairs of layer and feature, for those alone. A file has the feature's `top`
    texts, then `per_group` tokens of each of `groups` quantiles, all with `around` tokens on either side; the
    distribution of its activations; the `logits` tokens that its decoder rows raise and lower most; its label, where
    the model has one. What comes back is the new folder: it is there whole or not at all.
    Memory is bounded but for the texts' token ids; on disk, 12 bytes an activation (16 in float64) are needed on the
    way.
    """
    layout = Layout(*(checks.whole(_OP, n, v, 0) for n, v in (
        ("top", top), ("groups", groups), ("per_group", per_group), ("around", around),
    )))  # fmt: skip
    logits, context = checks.whole(_OP, "logits", logits, 0), checks.whole(_OP, "context", context, 1)
    check_model(_OP, model)
    told = Progress(progress)
    target, wanted = _target(folder, scan), _wanted(model, features)
    corpus = _corpus(model, texts, context)
    writer = _Writer(model, corpus, Words(model.tokenizer), layout, Outputs(model, logits), scan)
    target.parent.mkdir(exist_ok=True)
    try:
        with draft_folder(_OP, target, None) as draft:
            with tempfile.TemporaryDirectory(prefix=".activations-", dir=draft) as held:
                runs = Runs(Path(held), wanted)
                _read(model, corpus, runs, told)
                writer.write(runs, draft, told)
            os.sync()  # before the folder takes its name: one call, where a call a file would take hours
    finally:
        told.close()
    return target


def _target(folder: str | os.PathLike[str], scan: str) -> Path:
    if not isinstance(scan, str):
        raise TypeError(f"{_OP}: scan must be a string, got {type(scan).__name__}")
    if not _SCAN.fullmatch(scan):
        rule = "a name without slashes or control characters that does not begin with a dot"
        raise ValueError(f"{_OP}: scan must be {rule}, got {scan!r}")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{_OP}: folder must be one that exists, got {os.fspath(folder)}")
    features = Path(folder) / "features"
    if features.exists():
        return new_folder(_OP, features / scan)
    return features / scan


def _wanted(model: ReplacementModel, features: Any) -> list[np.ndarray]:
    """A mask of the features of each layer."""
    sizes = [model.transcoders.size(layer) for layer in range(model.depth)]
    if features is None:
        return [np.ones(size, bool) for size in sizes]
    wanted = [np.zeros(size, bool) for size in sizes]
    pairs = torch.as_tensor(features)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point() or not len(pairs):
        rule = "pairs of layer and feature, such as graph.features[:, [0, 2]]"
        raise ValueError(f"{_OP}: features must be {rule}, got shape {list(pairs.shape)} of {pairs.dtype}")
    for layer, feature in pairs.tolist():
        if not (0 <= layer < len(sizes) and 0 <= feature < sizes[layer]):
            raise ValueError(f"{_OP}: features must be of the model's transcoders, got {feature} of layer {layer}")
        wanted[layer][feature] = True
    return wanted


def _corpus(model: ReplacementModel, texts: Texts, context: int) -> Corpus:
    sequences = token_ids(_OP, texts, model, None, model.weights.vocabulary)
    longest = min(context, model.weights.longest or context)
    return Corpus.of(pieces(_OP, sequences, longest, model.ignore_positions), model.ignore_positions)


def _read(model: ReplacementModel, corpus: Corpus, runs: Runs, told: Progress) -> None:
    whole = len(corpus.ids)
    told.step("reading texts", 0, whole, "tokens")
    for begin, texts in corpus.batches(_POSITIONS):
        runs.add(begin, model.activations(texts))
        told.step("reading texts", begin + sum(len(ids) for ids in texts), whole, "tokens")
    runs.flush()


@dataclass(frozen=True, eq=False)
class _Writer:
    model: ReplacementModel
    corpus: Corpus
    words: Words
    layout: Layout
    outputs: Outputs
    scan: str

    def write(self, runs: Runs, folder: Path, told: Progress) -> None:
        done, whole = 0, sum(int(mask.sum()) for mask in runs.wanted)
        told.step("writing files", 0, whole, "features")
        for layer, wanted in enumerate(runs.wanted):
            for block in runs.blocks(layer):
                size = len(block.ptr) - 1
                chosen = np.flatnonzero(wanted[block.first : block.first + size])
                for found in self._described(layer, block, chosen):
                    name = f"{feature_id(layer, found['index'])}.json"
                    (folder / name).write_text(json.dumps(found, allow_nan=False, separators=(",", ":")))
                    done += 1
                    told.step("writing files", done, whole, "features")

    def _described(self, layer: int, block: Block, chosen: np.ndarray) -> Any:
        """The file of each feature of a block that was chosen, one at a time."""
        best, worst = self.outputs.extremes(layer, torch.from_numpy(block.first + chosen))
        for at, raised, lowered in zip(chosen.tolist(), best, worst, strict=True):
            feature, (begin, end) = block.first + at, block.ptr[at : at + 2]
            found = describe(block.token[begin:end], block.value[begin:end], self.corpus, self.words, self.layout)
            label = self.model.labels.get((layer, feature))
            yield {
                "index": feature,
                "transcoder_id": f"{self.scan}/{layer}",
                **({} if label is None else {"label": label}),
                **found,
                "top_logits": self._text(raised),
                "bottom_logits": self._text(lowered),
            }

    def _text(self, tokens: Sequence[int]) -> list[str]:
        return [self.words(token) for token in tokens]
