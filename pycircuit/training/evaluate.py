"""Evaluation of transcoders: explained variance, sparsity, and agreement of the replacement model with the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from os import PathLike

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.files.atomic import writable_svg, write_text
from pycircuit.graph.show.html_table import html_table
from pycircuit.model import ReplacementModel
from pycircuit.model.transcoder_hooks import Read, Write, eager_transcoder_hooks
from pycircuit.ops import FileRows, SparseFeatures
from pycircuit.ops.torch_settings import without_autocast
from pycircuit.progress import Progress, Report
from pycircuit.trace.attribute import attribute
from pycircuit.trace.trace_options import MaxFeatures
from pycircuit.transcoders import Transcoders

from .figure import Panel, chart
from .sources import Model, Texts, Tokenizer, source_of, split_to_context, token_ids
from .stream import POSITIONS, Source, batches

LOGITS = 1 << 25  # of one model in memory at a time; three models are compared
DECADES = tuple(range(-6, 1))  # density 10^-6 and below ... 1


@dataclass(frozen=True)
class Evaluation:
    """Measures over `tokens` tokens, the ignored opening positions left out. Lists have one entry a layer.

    variance: explained share of the variance of the MLPs' outputs; active: features a token (L0); dead: share of
    features that were never active; density: [layers][8], number of features by the share of tokens at which they are
    active: never, up to 1e-6, above it up to 1e-5, ..., above 0.1. None for a layer without features.
    agreement: share of tokens at which the model and the replacement model (every MLP replaced by its reconstruction,
    without error nodes) give the same next token the highest probability; divergence: mean KL(model || replacement
    model), in nats; ablated: mean KL with every MLP's mean output in its place, for comparison.
    replacement, completeness: pc.Graph.scores averaged over graphs of `graphs` texts; None without any.
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

    def as_dict(self) -> dict[str, object]:
        """Return the measures by name, ready for JSON."""
        return asdict(self)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw explained variance, L0 and the histogram of features by density as SVG."""
        density = {f"layer {i}": [float(n) for n in d] for i, d in enumerate(self.density) if d is not None}
        by_layer = {"variance explained": self.variance, "features a token": self.active}
        panels = [
            Panel(title, {"all": [nan if v is None else v for v in values]}, "layer 0", str(len(values) - 1))
            for title, values in by_layer.items()
        ]
        panels.append(Panel("features by density", density, "never", "0.1 to 1"))
        write_text("plot", writable_svg("plot", path), chart(panels))

    def _repr_html_(self) -> str:
        names = ["never", *(f"to 1e{n}" for n in DECADES[:-1]), "to 1"]
        rows = zip(self.variance, self.active, self.dead, self.density, strict=True)
        return html_table(
            ["layer", "variance", "features a token", "dead", *(f"density {name}" for name in names)],
            [[i, v, a, d, *([None] * len(names) if n is None else n)] for i, (v, a, d, n) in enumerate(rows)],
            "\n".join(self._summary()),
        )

    def _summary(self) -> list[str]:
        lines = [
            f"replacement model, {self.tokens} tokens: next token agrees {100 * self.agreement:.1f}%, "
            f"KL {self.divergence:.4f} nats (MLPs ablated: {self.ablated:.4f})"
        ]
        if self.graphs:
            lines.append(
                f"graphs of {self.graphs} texts: replacement score {self.replacement:.3f}, "
                f"completeness score {self.completeness:.3f}"
            )
        return lines

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
        return "\n".join([*lines, *self._summary()])


@without_autocast()
def evaluate(
    model: Model,
    transcoders: Transcoders,
    texts: Texts,
    *,
    tokenizer: Tokenizer | None = None,
    ignore_positions: int | None = None,
    context: int = 256,
    graphs: int = 0,
    max_features: MaxFeatures = None,
    progress: bool | Report = True,
) -> Evaluation:
    """Evaluate transcoders on texts or token ids they were not trained on; the result prints as a table.

    model: a transformers causal model, or a ReplacementModel. graphs: the number of texts, cut to the context, that
    are traced for their scores; max_features: as in pc.attribute. progress: True, False, or a function (phase, done,
    total).
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
    sequences = split_to_context("evaluate", sequences, longest, source.ignore)
    show = Progress(progress)
    try:
        sums = _Sums(source, transcoders)
        for batch in _with_progress(show, "explained variance", sequences, POSITIONS):
            sums.add(batch)
        mean = sums.mean()
        for batch in _with_progress(show, "next tokens", sequences, max(1, LOGITS // source.weights.vocabulary)):
            sums.compare(batch, mean)
        evaluation = sums.result()
        return _with_scores(evaluation, source, transcoders, sequences[:graphs], max_features, show)
    finally:
        show.close()


def _with_progress(show: Progress, phase: str, sequences: list[Tensor], positions: int) -> Iterator[list[Tensor]]:
    """Batches of sequences, each counted in tokens once it is done."""
    total, done = sum(len(s) for s in sequences), 0
    show.step(phase, 0, total, "tokens")
    for batch in batches([len(s) for s in sequences], positions):
        yield [sequences[i] for i in batch]
        done += sum(len(sequences[i]) for i in batch)
        show.step(phase, done, total, "tokens")


def _with_scores(
    evaluation: Evaluation,
    source: Source,
    transcoders: Transcoders,
    prompts: list[Tensor],
    max_features: MaxFeatures,
    show: Progress,
) -> Evaluation:
    """Evaluation with the mean scores of the prompts' graphs; as it is without prompts."""
    if not prompts:
        return evaluation
    model = ReplacementModel(source.model, transcoders, ignore_positions=source.ignore)
    scores = []
    show.step("graphs", 0, len(prompts), "graphs")
    for ids in prompts:
        scores.append(attribute(model, ids, max_features=max_features, labels=False, progress=False).scores())
        show.step("graphs", len(scores), len(prompts), "graphs")
    return replace(
        evaluation,
        graphs=len(scores),
        replacement=sum(s.replacement for s in scores) / len(scores),
        completeness=sum(s.completeness for s in scores) / len(scores),
    )


class _Sums:
    """Sums over batches, in float64: a sum of squares minus the square of a sum loses half the digits."""

    def __init__(self, source: Source, transcoders: Transcoders) -> None:
        self.source, self.transcoders = source, transcoders
        depth, width, device = len(source.weights.layers), source.weights.width, source.weights.device
        self.tokens = 0
        # of the MLPs' outputs and of the reconstructions' errors
        self.square, self.error_square = (torch.zeros(depth, dtype=torch.float64, device=device) for _ in range(2))
        self.total, self.error_total = (torch.zeros(depth, width, dtype=torch.float64, device=device) for _ in range(2))
        self.active_tokens = [  # of each feature
            torch.zeros(transcoders.size(layer), dtype=torch.int64, device=device) for layer in range(depth)
        ]
        self.agreed = self.divergence = self.ablated = 0.0

    def add(self, sequences: Sequence[Tensor]) -> None:
        """Add explained variance and activity on the model's own streams."""
        x, y = self.source.activations(sequences)
        features = [self.transcoders.encode(layer, x[layer]) for layer in range(len(x))]
        error = y - self.transcoders.reconstruct(features, x)
        self.tokens += x.shape[1]
        self.error_square += error.double().square().sum((1, 2))
        self.error_total += error.double().sum(1)
        self.square += y.double().square().sum((1, 2))
        self.total += y.double().sum(1)
        for counts, active in zip(self.active_tokens, features, strict=True):
            if len(counts):
                counts += torch.bincount(active.index[active.value != 0], minlength=len(counts))

    def mean(self) -> Tensor:
        """Mean output of each MLP: [layers, width]."""
        return (self.total / self.tokens).to(self.source.weights.dtype)

    def compare(self, sequences: list[Tensor], mean: Tensor) -> None:
        """Add the model's agreement with the replacement model and its KL to it and to one with ablated MLPs."""
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self.source.weights.device)
        position = torch.arange(ids.shape[1], device=ids.device)
        lengths = torch.tensor([len(s) for s in sequences], device=ids.device)
        mask = (position >= self.source.ignore) & (position < lengths[:, None])
        own = self._log_probabilities(ids, mask, lambda layer, y: None)
        reconstruction = Reconstruction(self.transcoders, self.source.ignore)
        replaced = self._log_probabilities(ids, mask, reconstruction.write, reconstruction.read)

        def ablate(layer: int, y: Tensor) -> Tensor | None:
            if not self.transcoders.writes_to(layer):
                return None
            return torch.cat([y[:, : self.source.ignore], mean[layer].expand_as(y[:, self.source.ignore :])], 1)

        self.agreed += int((own.argmax(-1) == replaced.argmax(-1)).sum())
        self.divergence += _divergence(own, replaced)
        self.ablated += _divergence(own, self._log_probabilities(ids, mask, ablate))

    def _log_probabilities(self, ids: Tensor, mask: Tensor, write: Write, read: Read = lambda layer, x: None) -> Tensor:
        """Log probabilities of the next token at the positions of a mask, under hooks: [positions, vocabulary]."""
        source = self.source
        with eager_transcoder_hooks(
            source.model, source.family, source.weights, source.reads, source.writes, read, write
        ):
            logits = source.model(input_ids=ids, use_cache=False).logits[mask]
        return torch.log_softmax(logits.to(source.weights.dtype), -1)

    def result(self) -> Evaluation:
        """Evaluation of all tokens so far."""
        variance = self.square - self.total.square().sum(1) / self.tokens
        unexplained = self.error_square - self.error_total.square().sum(1) / self.tokens
        layers = range(len(self.active_tokens))
        written = [self.transcoders.writes_to(layer) for layer in layers]
        density = [counts.double() / self.tokens if len(counts) else None for counts in self.active_tokens]
        return Evaluation(
            tokens=self.tokens,
            variance=[float(1 - unexplained[i] / variance[i]) if written[i] else None for i in layers],
            active=[None if d is None else float(d.sum()) for d in density],
            dead=[None if d is None else float((d == 0).double().mean()) for d in density],
            density=[None if d is None else _histogram(d) for d in density],
            agreement=self.agreed / self.tokens,
            divergence=self.divergence / self.tokens,
            ablated=self.ablated / self.tokens,
        )


@torch.no_grad()
@without_autocast()
def replaced_logits(model: ReplacementModel, ids: Tensor) -> Tensor:
    """Logits of the replacement model without error nodes: [prompts, positions, vocabulary].

    ids: [prompts, positions], prompts of one length.
    """
    t = model.transcoders
    reconstruction = Reconstruction(t, model.ignore_positions)
    read, write = reconstruction.read, reconstruction.write
    with eager_transcoder_hooks(model.hf_model, model.family, model.weights, t.reads, t.writes, read, write):
        logits: Tensor = model.hf_model(input_ids=ids, use_cache=False).logits
    return logits


class Reconstruction:
    """Hooks of one forward that replace every MLP's output by its reconstruction, past the ignored positions."""

    def __init__(self, transcoders: Transcoders, ignore: int) -> None:
        self.transcoders, self.ignore = transcoders, ignore
        self.features: list[SparseFeatures] = []
        self.x: Tensor | None = None

    def read(self, layer: int, x: Tensor) -> None:
        """Encode the features of a layer."""
        self.x = x[:, self.ignore :].flatten(0, 1)
        self.features.append(self.transcoders.encode(layer, self.x))

    def write(self, layer: int, y: Tensor) -> Tensor | None:
        """Return the output that takes y's place; None keeps y."""
        assert self.x is not None  # a layer is read before it writes
        if not self.transcoders.writes_to(layer):
            return None
        out = self._reconstruct(layer, self.x)
        return torch.cat([y[:, : self.ignore], out.view_as(y[:, self.ignore :])], 1)

    def _reconstruct(self, layer: int, x: Tensor) -> Tensor:
        """Reconstruction of one layer from the features of the layers that write to it: [positions, width]."""
        t, out = self.transcoders, torch.zeros_like(x)
        for source in t.sources(layer):
            features, w_dec = self.features[source], t.w_dec[source]
            if features.count and isinstance(w_dec, FileRows) and len(w_dec.shape) == 3:
                out += ops.decode(features, w_dec)[layer - source]
            elif features.count:
                out += ops.decode(features, t.decoder(source, layer))
        bias, skip = t.bias(layer), t.w_skip[layer]
        if bias is not None:
            out += bias
        return out if skip is None else out.addmm_(x, skip.to(out.dtype))


def _divergence(p: Tensor, q: Tensor) -> float:
    """Sum over rows of KL(p || q), of log probabilities."""
    return float((p.exp() * (p - q)).sum(dtype=torch.float64))


def _histogram(density: Tensor) -> list[int]:
    """Number of features that are never active, then by density up to 10^-6, up to 10^-5, ..., up to 1."""
    bounds = torch.tensor([0.0, *(10.0**n for n in DECADES)], dtype=torch.float64, device=density.device)
    return torch.bincount(torch.bucketize(density, bounds), minlength=len(bounds)).tolist()
