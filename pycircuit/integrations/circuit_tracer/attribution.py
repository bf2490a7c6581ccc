"""`attribute` with circuit-tracer's arguments, nodes, order and numbers, by pycircuit's sweep."""

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
_forward_lock = RLock()  # one forward at a time may use hooks and choose an attention function; sweeps run in parallel


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
    """Trace the attribution graph of a prompt on circuit-tracer's replacement model, as circuit-tracer's `Graph`.

    prompt, attribution_targets, max_n_logits, desired_logit_prob: as in circuit_tracer.attribute.
    max_feature_nodes: number of features with a row, chosen in rounds of update_interval * batch_size as there; None
    or 0: all. batch_size has no other meaning: tiles are sized to the cache. offload: the model's MLPs, which the
    sweep does not need, are offloaded meanwhile. verbose: progress on stderr.

    Sums are float32 whatever the model's dtype (float64 in a float64 model); activation_values and
    logit_probabilities have the model's dtype.
    """
    for name, value, lowest in (("batch_size", batch_size, 1), ("update_interval", update_interval, 1)):
        checks.whole("attribute", name, value, lowest)
    if max_feature_nodes is not None:
        checks.whole("attribute", "max_feature_nodes", max_feature_nodes, 0)
    if offload and offload not in OFFLOADS:
        raise ValueError(f"attribute: offload must be 'cpu', 'disk' or None, got {offload!r}")
    origin = source(model)
    freeze = _backend(model)
    progress, offload_handles = Progress(bool(verbose)), []  # type: tuple[Progress, list[Any]]
    try:
        with torch.no_grad():
            ids = model.ensure_tokenized(prompt)
            progress.step("forward", 0, len(ids), "positions")
            with _forward_lock:
                local = freeze(model, ids)
            targets = _targets(origin, local, attribution_targets, max_n_logits, desired_logit_prob)
            if offload:
                offload_handles = library("utils.disk_offload").offload_modules(origin.mlps, offload)
            return _graph(origin, ids, local, targets, max_feature_nodes, update_interval * batch_size, progress)
    finally:
        for restore in offload_handles:
            restore()
        progress.close()


def _backend(model: Any) -> Callable[[Any, Tensor], LocalReplacement]:
    """The function that freezes a prompt on a circuit-tracer model."""
    if model.backend == "transformerlens":
        from .transformer_lens import frozen
    else:
        from .nnsight import frozen
    return frozen


def _targets(
    origin: Source, local: LocalReplacement, attribution_targets: Any, max_n_logits: int, probability: float
) -> Any:
    """circuit-tracer's targets, by its own rules, from logits rounded to the model's dtype as there."""
    last = torch.tensor([local.model.positions - 1], device=local.model.device)
    targets = library("attribution.targets").AttributionTargets(
        attribution_targets=attribution_targets,
        logits=local.model.logits(last)[0].to(origin.unembedding.dtype),
        unembed_proj=origin.unembedding,
        tokenizer=origin.model.tokenizer,
        max_n_logits=max_n_logits,
        desired_logit_prob=probability,
    )
    if not len(targets):
        got = f"{attribution_targets} and {max_n_logits}"
        raise ValueError(f"attribute: attribution_targets and max_n_logits must leave a target, got {got}")
    return targets


def _targets_as_rows(local: LocalReplacement, targets: Any) -> list[Target]:
    """circuit-tracer's targets as targets of pycircuit's trace."""
    frozen = local.model
    width, depth = frozen.width, len(frozen.layers)
    last_position = frozen.positions - 1
    vectors = targets.logit_vectors
    if tuple(vectors.shape) != (len(targets), width):
        raise ValueError(f"attribute: a target's vec must have shape [{width}], got {list(vectors.shape[1:])}")
    normed = frozen.final_norm.forward(frozen.final_stream)[last_position].double()
    rows = []
    for target, weight, vector in zip(
        targets.logit_targets, targets.logit_probabilities.tolist(), vectors, strict=True
    ):
        vector = vector.detach().to(frozen.embeddings)
        value = float(normed @ vector.double())
        rows.append(Target(target.token_str, target.vocab_idx, weight, depth, last_position, vector, value))
    return rows


def _graph(
    origin: Source,
    ids: Tensor,
    local: LocalReplacement,
    targets: Any,
    max_feature_nodes: int | None,
    round_size: int,
    progress: Progress,
) -> Any:
    rows: Sequence[Target] = _targets_as_rows(local, targets)
    edges = adjacency(local, rows, max_feature_nodes, round_size, progress)
    return library("graph").Graph(
        input_string=origin.model.tokenizer.decode(ids),
        input_tokens=ids,
        logit_targets=targets.logit_targets,
        logit_probabilities=targets.logit_probabilities,
        vocab_size=targets.vocab_size,
        active_features=edges.active,
        activation_values=edges.values.to(origin.unembedding.dtype),
        selected_features=edges.selected,
        adjacency_matrix=edges.matrix,
        cfg=origin.model.cfg,
        **origin.scan,
    )
