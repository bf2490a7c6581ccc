"""Texts that features are active on, for their cards: from a folder of pc.write_examples, or of the demo model's facts.

Either gives the content of a feature's example file.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pycircuit.examples.feature import ExampleCounts, describe
from pycircuit.examples.token_texts import Corpus, TokenText
from pycircuit.graph.io.page_json import feature_id
from pycircuit.model import ReplacementModel

OP = "page"
LARGEST_FILE = 16 << 20  # bytes
_TAIL = 256  # bytes at the end of a file, where its frequency may stand
_FREQUENCY = re.compile(rb'"activation_frequency"\s*:\s*([0-9.eE+-]+)')
_COUNTS = ExampleCounts(top=10, groups=3, per_group=3, around=12)
STATEMENTS = 800  # of the demo model's facts


class Examples(Protocol):
    """A source of examples."""

    def content(self, layer: int, feature: int) -> dict[str, Any] | None:
        """Return the content of a feature's example file, or None where there is none."""

    def density(self, layer: int, feature: int) -> float | None:
        """Return the share of tokens that a feature is active on, where it is known without much work."""


class ExampleFolder:
    """A folder with one {id}.json a feature."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._densities: dict[tuple[int, int], float | None] = {}

    @classmethod
    def of(cls, folder: Path) -> ExampleFolder | None:
        """Return the examples of a folder, or of the only set in its features/; None where there are none."""
        sets = [folder, *sorted(path for path in (folder / "features").glob("*") if path.is_dir())]
        filled = [path for path in sets if any(_is_example(file.name) for file in path.glob("*.json"))]
        return cls(filled[0]) if len(filled) == 1 else None

    def content(self, layer: int, feature: int) -> dict[str, Any] | None:
        """Read a feature's file."""
        data = self._bytes(layer, feature)
        if data is None:
            return None
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            content = None
        return content if isinstance(content, dict) and content.get("index") == feature else None

    def density(self, layer: int, feature: int) -> float | None:
        """Find the frequency in a feature's file without reading it as JSON."""
        key = (layer, feature)
        if key not in self._densities:
            match = _FREQUENCY.search(self._bytes(layer, feature) or b"")
            self._densities[key] = None if match is None else _number(match[1].decode())
        return self._densities[key]

    def _bytes(self, layer: int, feature: int) -> bytes | None:
        path = self.folder / f"{feature_id(layer, feature)}.json"
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_FILE:
                return None
            return path.read_bytes()
        except OSError:
            return None


def _is_example(name: str) -> bool:
    return name.removesuffix(".json").isdecimal()


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


class CorpusExamples:
    """Activations of a model on texts, all in memory; the model runs at first use."""

    def __init__(self, model: ReplacementModel, texts: Sequence[str]) -> None:
        self.model, self.texts = model, texts
        self._token_text = TokenText(model.tokenizer)
        self._lock = threading.Lock()
        self._corpus: Corpus | None = None
        self._layers: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # offsets by feature, tokens, values

    @classmethod
    def of_demo(cls, model: ReplacementModel) -> CorpusExamples:
        """Return examples of some of the facts that the demo model was taught."""
        from pycircuit.demo.facts import facts

        prompts = [statement.prompt for statement in facts().statements()]
        return cls(model, prompts[:: max(1, len(prompts) // STATEMENTS)])

    def content(self, layer: int, feature: int) -> dict[str, Any] | None:
        """Describe a feature's activations."""
        corpus = self._run()
        offsets, token, value = self._layers[layer]
        begin, end = offsets[feature : feature + 2]
        return describe(token[begin:end], value[begin:end], corpus, self._token_text, _COUNTS)

    def density(self, layer: int, feature: int) -> float | None:
        """Return the share of tokens; None before the model has run."""
        if self._corpus is None:
            return None
        offsets = self._layers[layer][0]
        return float(offsets[feature + 1] - offsets[feature]) / max(1, self._corpus.tokens)

    def _run(self) -> Corpus:
        with self._lock:
            if self._corpus is None:
                ids = [self.model.tokens(text).cpu() for text in self.texts]
                activations = self.model.activations(ids)
                for layer in range(self.model.depth):
                    features = [prompt[layer] for prompt in activations]
                    counts = torch.cat([f.row_ptr.diff() for f in features]).cpu().numpy()
                    index = torch.cat([f.index for f in features]).cpu().numpy()
                    value = torch.cat([f.value for f in features]).float().cpu().numpy()
                    token = np.repeat(np.arange(len(counts)), counts)
                    order = np.argsort(index, kind="stable")
                    sizes = np.bincount(index, minlength=self.model.transcoders.size(layer))
                    offsets = np.concatenate([np.zeros(1, np.int64), sizes.cumsum()])
                    self._layers.append((offsets, token[order], value[order]))
                self._corpus = Corpus.of(ids, self.model.ignore_positions)
            return self._corpus
