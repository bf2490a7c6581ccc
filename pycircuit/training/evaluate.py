"""What transcoders are worth: how much they explain, how sparsely, and what the model says with them as its MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.files.atomic import writable_svg, write_text
from pycircuit.model import ReplacementModel
from pycircuit.model.transcoder_hooks import eager_transcoder_hooks
from pycircuit.ops import FileRows, SparseFeatures
from pycircuit.ops.torch_settings import without_autocast
from pycircuit.trace.attribute import attribute
from pycircuit.transcoders import Transcoders

from .figure import Panel, chart
from .sources import Texts, pieces, source_of, token_ids
from .stream import Source, batches

LOGITS = 1 << 25  # held at one time, three times over
DECADES = tuple(range(-6, 1))  # density 10^-6 and below ... 1


@dataclass(frozen=True)
class Evaluation:
    """Over `tokens` tokens, the ignored opening positions left out. Lists have one entry a layer.

    variance: share of the variance of what the MLPs write that is explained; active: features a token (L0); dead:
    share of features that never were; density: [layers][8], features by the share of tokens they are active at: never,
    up to 1e-6, above it up to 1e-5, ..., above 0.1. None for a layer without features.
    agreement: share of tokens at which the replacement model (every MLP replaced by its reconstruction, errors left
    out) and the model find the same next token most probable; divergence: mean KL(model || replacement model), in nats.
    ablated: the same divergence with every MLP's mean in its place, for comparison.
    replacement, completeness: the scores of graphs (pc.Graph.scores), averaged over `graphs` texts; None without any.
    """

    tokens: int
    variance: list[float | None]
    active: list[float | None]
    dead: list[float | None]
    density: list[list[int] | None]
    agreement: float
    divergence: float
    ablated: float
    graphs: int = 0
    replacement: float | None = None
    completeness: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def plot(self, path: str | PathLike[str]) -> None:
        """An SVG: variance explained and L0 over layers, and how many features are how often active, a line a layer."""
        density = {f"layer {i}": [float(n) for n in d] for i, d in enumerate(self.density) if d is not None}
        by_layer = {"variance explained": self.variance, "features a token": self.active}
        panels = [
            Panel(title, {"all": [nan if v is None else v for v in values]}, "layer 0", str(len(values) - 1))
            for title, values in by_layer.items()
        ]
        write_text(
            "plot",
            writable_svg("plot", path),
            chart([*panels, Panel("features by density", density, "never", "0.1 to 1")]),
        )

    def __str__(self) -> str:
        names = ["never", *(f"1e{n}" for n in DECADES[:-1]), "1"]
        lines = ["layer  variance      L0    dead   features by density: " + " ".join(f"{n:>6}" for n in names)]
        for layer, variance in enumerate(self.variance):
            active, dead, density = self.active[layer], self.dead[layer], self.density[layer]
            explained = "       -" if variance is None else f"{variance:8.3f}"
            if active is None or dead is None or density is None:
                lines.append(f"{layer:5}  {explained}       -       -")
                continue
            counts = " ".join(f"{n:6}" for n in density)
            lines.append(f"{layer:5}  {explained}  {active:6.1f}  {100 * dead:5.1f}%  {'':>23}{counts}")
        lines.append(
            f"replacement model, {self.tokens} tokens: next token agrees {100 * self.agreement:.1f}%, "
            f"KL {self.divergence:.4f} nats (MLPs ablated: {self.ablated:.4f})"
        )
        if self.graphs:
            lines.append(
                f"graphs of {self.graphs} texts: replacement score {self.replacement:.3f}, "
                f"completeness score {self.completeness:.3f}"
            )
        return "\n".join(lines)


@without_autocast()
def evaluate(
    model: Any,
    transcoders: Transcoders,
    texts: Texts,
    *,
    tokenizer: Any = None,
    ignore_positions: int | None = None,
    context: int = 256,
    graphs: int = 0,
    max_features: int | None = None,
) -> Evaluation:
    """Judge transcoders on texts or token ids they were not trained on; print what comes back for a table.

    model: a transformers causal model, or a ReplacementModel that holds one. graphs: how many of the texts, cut to the
    context, are traced for their scores; max_features: as in pc.attribute.
    """
    if type(graphs) is not int or graphs < 0:
        raise ValueError(f"evaluate: graphs must be a whole number, zero or more, got {graphs!r}")
    if not isinstance(transcoders, Transcoders):
        known = "pc.PerLayerTranscoders or pc.CrossLayerTranscoder"
        raise TypeError(f"evaluate: transcoders must be {known}, got {type(transcoders).__name__}")
    source = source_of("evaluate", model, transcoders.reads, transcoders.writes, ignore_positions)
    transcoders.check(source)
    sequences = token_ids("evaluate", texts, model, tokenizer, source.weights.vocabulary)
    longest = min(context, source.weights.longest or context)
    kept = pieces("evaluate", sequences, longest, source.ignore)
    sums = _Sums(source, transcoders)
    for batch in batches([len(s) for s in kept]):
        sums.add([kept[i] for i in batch])
    mean = sums.mean()
    for batch in batches([len(s) for s in kept], max(1, LOGITS // source.weights.vocabulary)):
        sums.compare([kept[i] for i in batch], mean)
    found = sums.result()
    return replace(found, **_scores(source, transcoders, kept[:graphs], max_features)) if graphs else found


def _scores(source: Source, transcoders: Transcoders, prompts: list[Tensor], max_features: int | None) -> Any:
    """How much of the graphs goes through features: means over prompts, for an Evaluation."""
    model = ReplacementModel(source.model, transcoders, ignore_positions=source.ignore)
    each = [attribute(model, ids, max_features=max_features, progress=False).scores() for ids in prompts]
    count = len(each)
    return {
        "graphs": count,
        "replacement": sum(s.replacement for s in each) / count,
        "completeness": sum(s.completeness for s in each) / count,
    }


class _Sums:
    """Adds up over batches. In float64: a sum of squares minus the square of a sum loses half the digits."""

    def __init__(self, source: Source, transcoders: Transcoders) -> None:
        self.source, self.transcoders = source, transcoders
        depth, width, device = len(source.weights.layers), source.weights.width, source.weights.device
        self.tokens = 0
        self.missed, self.square = (torch.zeros(depth, dtype=torch.float64, device=device) for _ in range(2))
        self.total, self.missed_total = (
            torch.zeros(depth, width, dtype=torch.float64, device=device) for _ in range(2)
        )
        self.fired = [torch.zeros(transcoders.size(layer), dtype=torch.int64, device=device) for layer in range(depth)]
        self.agreed = self.divergence = self.ablated = 0.0

    def add(self, sequences: Sequence[Tensor]) -> None:
        """Explained variance and activity, on the model's own streams."""
        x, y = self.source.activations(sequences)
        features = [self.transcoders.encode(layer, x[layer]) for layer in range(len(x))]
        error = y - self.transcoders.reconstruct(features, x)
        self.tokens += x.shape[1]
        self.missed += error.double().square().sum((1, 2))
        self.missed_total += error.double().sum(1)
        self.square += y.double().square().sum((1, 2))
        self.total += y.double().sum(1)
        for layer, found in enumerate(features):
            if len(self.fired[layer]):
                self.fired[layer] += torch.bincount(found.index[found.value != 0], minlength=len(self.fired[layer]))

    def mean(self) -> Tensor:
        """Of what every MLP writes: [layers, width]."""
        return (self.total / self.tokens).to(self.source.weights.dtype)

    def compare(self, sequences: list[Tensor], mean: Tensor) -> None:
        """The model next to the model whose MLPs are replaced, and to one whose MLPs write their mean."""
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self.source.weights.device)
        place = torch.arange(ids.shape[1], device=ids.device)
        lengths = torch.tensor([len(s) for s in sequences], device=ids.device)
        kept = (place >= self.source.ignore) & (place < lengths[:, None])
        own = self._log_probabilities(ids, kept, lambda layer, y: None)
        replaced = _Replaced(self.transcoders, self.source.ignore)
        other = self._log_probabilities(ids, kept, replaced.write, replaced.read)

        def ablate(layer: int, y: Tensor) -> Tensor | None:
            if not self.transcoders.writes_to(layer):
                return None
            return torch.cat([y[:, : self.source.ignore], mean[layer].expand_as(y[:, self.source.ignore :])], 1)

        self.agreed += int((own.argmax(-1) == other.argmax(-1)).sum())
        self.divergence += _divergence(own, other)
        self.ablated += _divergence(own, self._log_probabilities(ids, kept, ablate))

    def _log_probabilities(self, ids: Tensor, kept: Tensor, write: Any, read: Any = lambda layer, x: None) -> Tensor:
        """[kept, vocabulary]."""
        source = self.source
        with eager_transcoder_hooks(
            source.model, source.family, source.weights, source.reads, source.writes, read, write
        ):
            logits = source.model(input_ids=ids, use_cache=False).logits[kept]
        return torch.log_softmax(logits.to(source.weights.dtype), -1)

    def result(self) -> Evaluation:
        there = self.square - self.total.square().sum(1) / self.tokens
        missed = self.missed - self.missed_total.square().sum(1) / self.tokens
        depth = range(len(self.fired))
        has = [bool(len(f)) for f in self.fired]
        share = [f.double() / self.tokens for f in self.fired]
        written = [self.transcoders.writes_to(layer) for layer in depth]
        return Evaluation(
            tokens=self.tokens,
            variance=[float(1 - missed[i] / there[i]) if written[i] else None for i in depth],
            active=[float(share[i].sum()) if has[i] else None for i in depth],
            dead=[float((share[i] == 0).double().mean()) if has[i] else None for i in depth],
            density=[_histogram(share[i]) if has[i] else None for i in depth],
            agreement=self.agreed / self.tokens,
            divergence=self.divergence / self.tokens,
            ablated=self.ablated / self.tokens,
        )


@torch.no_grad()
@without_autocast()
def replaced_logits(model: ReplacementModel, ids: Tensor) -> Tensor:
    """Of the replacement model, errors left out. ids: [prompts, positions], of one length -> [.., vocabulary]."""
    found, t = _Replaced(model.transcoders, model.ignore_positions), model.transcoders
    with eager_transcoder_hooks(
        model.hf_model, model.family, model.weights, t.reads, t.writes, found.read, found.write
    ):
        logits: Tensor = model.hf_model(input_ids=ids, use_cache=False).logits
    return logits


class _Replaced:
    """Hooks of one forward: every MLP's output becomes its reconstruction, past the ignored positions."""

    def __init__(self, transcoders: Transcoders, ignore: int) -> None:
        self.transcoders, self.ignore = transcoders, ignore
        self.features: list[SparseFeatures] = []
        self.x: Tensor | None = None

    def read(self, layer: int, x: Tensor) -> None:
        self.x = x[:, self.ignore :].flatten(0, 1)
        self.features.append(self.transcoders.encode(layer, self.x))

    def write(self, layer: int, y: Tensor) -> Tensor | None:
        assert self.x is not None  # a layer is read before it writes
        if not self.transcoders.writes_to(layer):
            return None
        out = self._written(layer, self.x)
        return torch.cat([y[:, : self.ignore], out.view_as(y[:, self.ignore :])], 1)

    def _written(self, layer: int, x: Tensor) -> Tensor:
        """The reconstruction of one layer, from the features of those before it: [positions, width]."""
        t, out = self.transcoders, torch.zeros_like(x)
        for source in t.sources(layer):
            found, w_dec = self.features[source], t.w_dec[source]
            if found.count and isinstance(w_dec, FileRows) and len(w_dec.shape) == 3:
                out += ops.decode(found, w_dec)[layer - source]
            elif found.count:
                out += ops.decode(found, t.decoder(source, layer))
        bias, skip = t.bias(layer), t.w_skip[layer]
        if bias is not None:
            out += bias
        return out if skip is None else out.addmm_(x, skip.to(out.dtype))


def _divergence(p: Tensor, q: Tensor) -> float:
    """The sum over rows of KL(p || q), from logarithms."""
    return float((p.exp() * (p - q)).sum(dtype=torch.float64))


def _histogram(share: Tensor) -> list[int]:
    """Never; then up to 10^-6, up to 10^-5, ... up to 1."""
    bounds = torch.tensor([0.0, *(10.0**n for n in DECADES)], dtype=torch.float64, device=share.device)
    return torch.bincount(torch.bucketize(share, bounds), minlength=len(bounds)).tolist()
