"""The `Graph` of a trace's rows, with its provenance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from pycircuit.graph import Graph, Targets, Tokens
from pycircuit.model.replacement import ReplacementModel

from .collect import RowCollector
from .contrast import KEY as CONTRASTS
from .row_store import PackedRows
from .targets import Target


def graph_of_rows(
    model: ReplacementModel,
    collector: RowCollector,
    packed: PackedRows,
    timings: dict[str, float],
    provenance: dict[str, Any],
) -> Graph:
    """Return the graph of all rows of a collector. provenance: of the trace; that of the model is added."""
    frozen, targets = collector.local.model, collector.targets
    tokens = frozen.tokens.cpu()
    text = [_text(model, [token]) for token in tokens.tolist()]
    return Graph(
        features=torch.stack([collector.layer, collector.position, collector.index], 1),
        values=collector.value,
        rows=packed.to_rows(),
        row_node=collector.row_node(),
        bias=collector.row_bias(),
        preactivation=collector.preactivation(),
        product_norm=collector.product_norm(),
        targets=Targets(
            [t.label for t in targets],
            torch.tensor([t.token for t in targets], device="cpu"),
            torch.tensor([t.weight for t in targets], dtype=torch.float64, device="cpu"),
            torch.tensor([t.position for t in targets], device="cpu"),
        ),
        tokens=Tokens(tokens, text),
        layers=len(frozen.layers),
        prompt=" ".join(text) if model.tokenizer is None else _text(model, tokens.tolist()),
        vocab_size=frozen.unembedding.shape[0],
        dropped=torch.from_numpy(packed.dropped),
        dropped_mass=torch.from_numpy(packed.mass),
        timings=timings,
        provenance={**_model_provenance(model), **provenance, **_contrasts(targets), **_probabilities(targets)},
        labels=_labels(model, collector),
    )


def _contrasts(targets: Sequence[Target]) -> dict[str, Any]:
    """Return the token ids of both sides of each contrast by its label."""
    sides = {t.label: [list(side) for side in t.sides] for t in targets if t.sides is not None}
    return {CONTRASTS: sides} if sides else {}


def _probabilities(targets: Sequence[Target]) -> dict[str, dict[str, float]]:
    """Return probabilities of tokens that the caller named, by token and position, where there are any."""
    known = {f"{t.token}/{t.position}": t.probability for t in targets if t.probability is not None}
    return {"probabilities": known} if known else {}


def _text(model: ReplacementModel, ids: list[int]) -> str:
    """Return the text of tokens, or the id of a single one where there is no tokenizer."""
    return str(ids[0]) if model.tokenizer is None else str(model.tokenizer.decode(ids))


def _labels(model: ReplacementModel, collector: RowCollector) -> dict[tuple[int, int], str]:
    """Return labels of the active features by (layer, feature)."""
    if not model.labels:
        return {}
    active = sorted(set(zip(collector.layer.tolist(), collector.index.tolist(), strict=True)))
    return {key: model.labels[key] for key in active if key in model.labels}


@cache
def _own_version() -> str:
    """Return the version of this package, which takes milliseconds to read."""
    return version("pycircuit")


def _model_provenance(model: ReplacementModel) -> dict[str, Any]:
    """Return the names and versions needed to trace this graph again."""
    import transformers

    return {
        "model": str(getattr(model.hf_model.config, "_name_or_path", "") or model.family.model_type),
        "family": model.family.model_type,
        "transcoders": repr(model.transcoders),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "ignore_positions": model.ignore_positions,
        "versions": {
            "pycircuit": _own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
