"""The model that the server traces and changes, with its name on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pycircuit.demo.tokenizer import NameTokenizer
from pycircuit.graph import Graph
from pycircuit.model import ReplacementModel


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model and its name."""

    model: ReplacementModel
    name: str

    @property
    def is_demo(self) -> bool:
        """True for the demo model, whose tokens are the words of its facts."""
        return isinstance(self.model.tokenizer, NameTokenizer)

    def may_be_of(self, graph: Graph) -> bool:
        """Return False for a graph of a model with other layers, another vocabulary or another name."""
        model = self.model
        name = str(getattr(model.hf_model.config, "_name_or_path", "") or model.family.model_type)
        known = graph.provenance.get("model", name)
        same_words = graph.vocab_size in (0, len(model.weights.unembedding))
        return graph.layers == model.depth and same_words and known == name

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids; the ids themselves without a tokenizer."""
        tokenizer = self.model.tokenizer
        return " ".join(map(str, tokens)) if tokenizer is None else str(tokenizer.decode(list(tokens)))
