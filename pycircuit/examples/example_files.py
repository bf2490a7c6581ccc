"""`pc.write_examples`: one file a feature, of the texts it is active on and the tokens it raises."""

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
from pycircuit.labels.output_tokens import OutputTokens
from pycircuit.model.replacement import ReplacementModel, check_model
from pycircuit.ops import checks
from pycircuit.progress import Progress, Report
from pycircuit.training.sources import Texts, split_to_context, token_ids

from .feature import ExampleCounts, describe
from .runs import ActivationRuns, Block
from .token_texts import Corpus, TokenText

_OP = "write_examples"
_POSITIONS = 4096  # of texts run at a time
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
    """Write `folder`/features/`scan`/{id}.json for every feature, which pages show for a chosen node of a graph.

    texts: strings or token ids, cut to the context as in training. folder: of the graphs' JSON; the id is that of the
    node there. features: pairs of layer and feature, for those alone. A file has the feature's `top` texts, then
    `per_group` tokens of each of `groups` quantiles, all with `around` tokens on either side; the distribution of its
    activations; the `logits` tokens that its decoder rows raise and lower most; its label, if the model has one.
    Returns the new folder, which is written atomically. Memory is bounded but for the texts' token ids; 12 bytes an
    activation (16 in float64) are needed on disk meanwhile.
    """
    sizes = {"top": top, "groups": groups, "per_group": per_group, "around": around}
    counts = ExampleCounts(**{name: checks.whole_number(_OP, name, value, 0) for name, value in sizes.items()})
    logits, context = checks.whole_number(_OP, "logits", logits, 0), checks.whole_number(_OP, "context", context, 1)
    check_model(_OP, model)
    progress_report = Progress(progress)
    target, masks = _target(folder, scan), _feature_masks(model, features)
    corpus = _corpus(model, texts, context)
    writer = _Writer(model, corpus, TokenText(model.tokenizer), counts, OutputTokens(model, logits), scan)
    target.parent.mkdir(exist_ok=True)
    try:
        with draft_folder(_OP, target, None) as draft:
            with tempfile.TemporaryDirectory(prefix=".activations-", dir=draft) as run_folder:
                runs = ActivationRuns(Path(run_folder), masks)
                _read_texts(model, corpus, runs, progress_report)
                writer.write(runs, draft, progress_report)
            os.sync()  # before the folder is renamed: one call, as a call for each file would need hours
    finally:
        progress_report.close()
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


def _feature_masks(model: ReplacementModel, features: Any) -> list[np.ndarray]:
    """Mask of the features to write, for each layer."""
    sizes = [model.transcoders.size(layer) for layer in range(model.depth)]
    if features is None:
        return [np.ones(size, bool) for size in sizes]
    masks = [np.zeros(size, bool) for size in sizes]
    pairs = torch.as_tensor(features)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point() or not len(pairs):
        rule = "pairs of layer and feature, such as graph.features[:, [0, 2]]"
        raise ValueError(f"{_OP}: features must be {rule}, got shape {list(pairs.shape)} of {pairs.dtype}")
    for layer, feature in pairs.tolist():
        if not (0 <= layer < len(sizes) and 0 <= feature < sizes[layer]):
            raise ValueError(f"{_OP}: features must be of the model's transcoders, got {feature} of layer {layer}")
        masks[layer][feature] = True
    return masks


def _corpus(model: ReplacementModel, texts: Texts, context: int) -> Corpus:
    sequences = token_ids(_OP, texts, model, None, model.weights.vocabulary)
    longest = min(context, model.weights.longest or context)
    return Corpus.of(split_to_context(_OP, sequences, longest, model.ignore_positions), model.ignore_positions)


def _read_texts(model: ReplacementModel, corpus: Corpus, runs: ActivationRuns, progress: Progress) -> None:
    total = len(corpus.ids)
    progress.step("reading texts", 0, total, "tokens")
    for begin, texts in corpus.batches(_POSITIONS):
        runs.add(begin, model.activations(texts))
        progress.step("reading texts", begin + sum(len(ids) for ids in texts), total, "tokens")
    runs.flush()


@dataclass(frozen=True, eq=False)
class _Writer:
    model: ReplacementModel
    corpus: Corpus
    token_text: TokenText
    counts: ExampleCounts
    outputs: OutputTokens
    scan: str

    def write(self, runs: ActivationRuns, folder: Path, progress: Progress) -> None:
        count, total = 0, sum(int(mask.sum()) for mask in runs.masks)
        progress.step("writing files", 0, total, "features")
        for layer, mask in enumerate(runs.masks):
            for block in runs.blocks(layer):
                size = len(block.ptr) - 1
                chosen = np.flatnonzero(mask[block.first : block.first + size])
                for description in self._descriptions(layer, block, chosen):
                    name = f"{feature_id(layer, description['index'])}.json"
                    (folder / name).write_text(json.dumps(description, allow_nan=False, separators=(",", ":")))
                    count += 1
                    progress.step("writing files", count, total, "features")

    def _descriptions(self, layer: int, block: Block, chosen: np.ndarray) -> Any:
        """Yield the content of the file of each chosen feature of a block."""
        best, worst = self.outputs.extremes(layer, torch.from_numpy(block.first + chosen))
        for index, raised, lowered in zip(chosen.tolist(), best, worst, strict=True):
            feature, (begin, end) = block.first + index, block.ptr[index : index + 2]
            description = describe(
                block.token[begin:end], block.value[begin:end], self.corpus, self.token_text, self.counts
            )
            label = self.model.labels.get((layer, feature))
            yield {
                "index": feature,
                "transcoder_id": f"{self.scan}/{layer}",
                **({} if label is None else {"label": label}),
                **description,
                "top_logits": self._text(raised),
                "bottom_logits": self._text(lowered),
            }

    def _text(self, tokens: Sequence[int]) -> list[str]:
        return [self.token_text(token) for token in tokens]
