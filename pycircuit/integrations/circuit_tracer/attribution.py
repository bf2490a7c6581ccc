"""circuit-tracer's `attribute`, by our sweep: the same arguments, nodes, order and numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any, Literal

import torch
from torch import Tensor

from pycircuit.model.replacement import LocalReplacement
from pycircuit.ops import checks
from pycircuit.ops.torch_settings import full_float32, without_autocast
from pycircuit.progress import Progress
from pycircuit.trace.targets import Target

from .edge_rows import adjacency
from .generations import Source, library, source

OFFLOADS = ("cpu", "disk")
_running = RLock()  # hooks, and the choice of an attention function, belong to one forward at a time; sweeps do not


@without_autocast()
@full_float32()
def attribute(
    prompt: str | Tensor | list[int],
    model: Any,
    *,
    attribution_targets: Any = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    batch_size: int = 512,
    max_feature_nodes: int | None = None,
    offload: Literal["cpu", "disk", None] = None,
    verbose: bool = False,
    update_interval: int = 4,
) -> Any:
    """The attribution graph of a prompt on circuit-tracer's replacement model, as circuit-tracer's `Graph`.

    prompt, attribution_targets, max_n_logits, desired_logit_prob: as circuit_tracer.attribute takes them.
    max_feature_nodes: how many features get a row, chosen in rounds of update_interval * batch_size as there; None or
    0: all. batch_size has no other meaning here: tiles are sized to the cache. offload: its modules that the sweep
    does not need, the MLPs, are offloaded meanwhile. verbose: progress on stderr.

    Sums are float32 whatever the model's type (float64 in a float64 model); activation_values and logit_probabilities
    come in its own.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("update_interval", update_interval, 1)):
        checks.whole_number("attribute", name, value, least)
    if max_feature_nodes is not None:
        checks.whole_number("attribute", "max_feature_nodes", max_feature_nodes, 0)
    if offload and offload not in OFFLOADS:
        raise ValueError(f"attribute: offload must be 'cpu', 'disk' or None, got {offload!r}")
    origin = source(model)
    freeze = _backend(model)
    show, handles = Progress(bool(verbose)), []  # type: tuple[Progress, list[Any]]
    try:
        with torch.no_grad():
            ids = model.ensure_tokenized(prompt)
            show.step("forward", 0, len(ids), "positions")
            with _running:
                local = freeze(model, ids)
            targets = _targets(origin, local, attribution_targets, max_n_logits, desired_logit_prob)
            if offload:
                handles = library("utils.disk_offload").offload_modules(origin.mlps, offload)
            return _graph(origin, ids, local, targets, max_feature_nodes, update_interval * batch_size, show)
    finally:
        for reload in handles:
            reload()
        show.close()


def _backend(model: Any) -> Callable[[Any, Tensor], LocalReplacement]:
    """The function that freezes a prompt on a model of circuit-tracer's."""
    if model.backend == "transformerlens":
        from .transformer_lens import frozen
    else:
        from .nnsight import frozen
    return frozen


def _targets(origin: Source, local: LocalReplacement, asked: Any, most: int, probability: float) -> Any:
    """Their targets, by their own rules, of the logits after the prompt, which they round to the model's type."""
    last = torch.tensor([local.model.positions - 1], device=local.model.device)
    found = library("attribution.targets").AttributionTargets(
        attribution_targets=asked,
        logits=local.model.logits(last)[0].to(origin.unembedding.dtype),
        unembed_proj=origin.unembedding,
        tokenizer=origin.model.tokenizer,
        max_n_logits=most,
        desired_logit_prob=probability,
    )
    if not len(found):
        raise ValueError(f"attribute: attribution_targets and max_n_logits must leave a target, got {asked} and {most}")
    return found


def _rows_of(local: LocalReplacement, targets: Any) -> list[Target]:
    """Their targets as rows of ours."""
    frozen = local.model
    width, at, depth = frozen.width, frozen.positions - 1, len(frozen.layers)
    vectors = targets.logit_vectors
    if tuple(vectors.shape) != (len(targets), width):
        raise ValueError(f"attribute: a target's vec must have shape [{width}], got {list(vectors.shape[1:])}")
    normed = frozen.final_norm.forward(frozen.final_stream)[at].double()
    found = []
    for target, weight, vector in zip(
        targets.logit_targets, targets.logit_probabilities.tolist(), vectors, strict=True
    ):
        vector = vector.detach().to(frozen.embeddings)
        value = float(normed @ vector.double())
        found.append(Target(target.token_str, target.vocab_idx, weight, depth, at, vector, value))
    return found


def _graph(
    origin: Source,
    ids: Tensor,
    local: LocalReplacement,
    targets: Any,
    most: int | None,
    round_size: int,
    show: Progress,
) -> Any:
    rows: Sequence[Target] = _rows_of(local, targets)
    found = adjacency(local, rows, most, round_size, show)
    return library("graph").Graph(
        input_string=origin.model.tokenizer.decode(ids),
        input_tokens=ids,
        logit_targets=targets.logit_targets,
        logit_probabilities=targets.logit_probabilities,
        vocab_size=targets.vocab_size,
        active_features=found.active,
        activation_values=found.values.to(origin.unembedding.dtype),
        selected_features=found.selected,
        adjacency_matrix=found.matrix,
        cfg=origin.model.cfg,
        **origin.scan,
    )
