"""The options of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, TypedDict, get_args

from pycircuit.ops.checks import is_int
from pycircuit.transcoders.types import READS, WRITES, Reads, Writes

Kind = Literal["plt", "clt"]
ActivationName = Literal["relu", "jumprelu", "topk", "batchtopk"]
InitialRows = Literal["random", "tokens"]
RowPrecision = Literal["float32", "bfloat16"]
ACTIVATIONS: tuple[str, ...] = get_args(ActivationName)
PENALISED = ("relu", "jumprelu")
PRECISIONS: tuple[str, ...] = get_args(RowPrecision)
CHOICES: dict[str, tuple[str, ...]] = {
    "kind": get_args(Kind),
    "activation": ACTIVATIONS,
    "reads": READS,
    "writes": WRITES,
    "precision": PRECISIONS,
    "forward": PRECISIONS,
    "rows": get_args(InitialRows),
}
HELP = "help"  # key of a field's metadata: its description on the command line and in the documents

_BUFFER_BYTES = 1 << 30
_BUFFER_TOKENS = 65536  # at most


def _integer(name: str, value: object, least: int) -> int:
    if not is_int(value):
        raise TypeError(f"train: {name} must be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"train: {name} must be at least {least}, got {value}")
    return int(value)


@dataclass(frozen=True)
class Recipe:
    """Options of a training run. Lengths are in steps of `batch` tokens.

    The penalty of jumprelu is tanh(sharpness * |decoder row| * value), that of relu |decoder row| * value. bandwidth
    is in units in which pre-activations begin with variance one. precision "bfloat16" halves the bytes that a step
    reads; weights, Adam's moments and sums keep their type, but other features may be active.
    """

    features: int = field(metadata={HELP: "features a layer"})
    steps: int = field(default=1000, metadata={HELP: "steps of `batch` tokens"})
    kind: Kind = field(
        default="plt", metadata={HELP: "plt: each layer's features write to it; clt: to it and every later one"}
    )
    activation: ActivationName = field(default="topk", metadata={HELP: " | ".join(ACTIVATIONS)})
    skip: bool = field(
        default=False,
        metadata={HELP: "a linear path beside the features, which begins as a ridge regression on the first buffer"},
    )
    k: int | tuple[int, ...] = field(
        default=32, metadata={HELP: "features a token (topk), or on average (batchtopk); or one number a layer"}
    )
    start: int = field(default=64, metadata={HELP: "features a token at the start (relu, jumprelu)"})
    sparsity: float = field(default=1e-3, metadata={HELP: "weight of the penalty on features (relu, jumprelu)"})
    sparsity_rise: float = field(
        default=1.0, metadata={HELP: "share of the run over which that weight grows from zero"}
    )
    sharpness: float = field(default=4.0, metadata={HELP: "factor inside the penalty's tanh (jumprelu)"})
    bandwidth: float = field(
        default=1.0, metadata={HELP: "width around a threshold in which pre-activations train it (jumprelu)"}
    )
    rows: InitialRows = field(
        default="random",
        metadata={HELP: "initial rows: random | tokens, drawn from the first tokens, far from each other"},
    )
    centre: bool = field(default=True, metadata={HELP: "subtract the mean of what transcoders read"})
    massive: float = field(
        default=50.0,
        metadata={
            HELP: "norm of outputs at the ignored positions, over the median, that get a feature of their own; 0: none"
        },
    )
    passes: int = field(default=1, metadata={HELP: "passes over a buffer before the next is computed"})
    batch: int = field(default=1024, metadata={HELP: "tokens a step"})
    rate: float | None = field(
        default=None, metadata={HELP: "Adam's learning rate; None: 2e-4 * sqrt(16384 / features)"}
    )
    warmup: int = field(default=50, metadata={HELP: "steps over which the rate rises"})
    decay: float = field(default=0.2, metadata={HELP: "last share of the run, over which the rate falls to zero"})
    revive: int = field(
        default=200, metadata={HELP: "steps without activity after which a feature gets new rows; 0: never"}
    )
    buffer: int | None = field(
        default=None, metadata={HELP: "tokens shuffled at a time; None: 1 GiB of activations, at most 65,536 tokens"}
    )
    context: int = field(default=256, metadata={HELP: "longest part of a text, in tokens"})
    seed: int = field(default=0, metadata={HELP: "of weights and shuffling"})
    reads: Reads | None = field(
        default=None, metadata={HELP: " | ".join(READS) + "; None: mlp_in for plt, resid_mid for clt"}
    )
    writes: Writes = field(default="mlp_out", metadata={HELP: " | ".join(WRITES)})
    precision: RowPrecision = field(
        default="float32", metadata={HELP: " | ".join(PRECISIONS) + ", of rows that a step reads"}
    )
    forward: RowPrecision = field(
        default="float32",
        metadata={
            HELP: " | ".join(PRECISIONS) + ", of the products of the model's forward; bfloat16 only where the "
            "hardware multiplies it"
        },
    )

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_integers()
        self._check_numbers()
        self._check_k()

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "reads" and value is None):
                raise ValueError(f"train: {name} must be one of {', '.join(allowed)}, got {value!r}")

    def _check_integers(self) -> None:
        if self.buffer is not None and is_int(self.batch):
            object.__setattr__(self, "buffer", _integer("buffer", self.buffer, self.batch))
        least = {"features": 1, "steps": 1, "start": 1, "batch": 1, "context": 2, "passes": 1, "warmup": 0, "revive": 0}
        for name, bound in least.items():
            object.__setattr__(self, name, _integer(name, getattr(self, name), bound))
        if is_int(self.seed):
            object.__setattr__(self, "seed", int(self.seed))

    def _check_numbers(self) -> None:
        for name in ("sparsity", "sparsity_rise", "decay", "sharpness", "bandwidth", "massive", "rate"):
            value, positive = getattr(self, name), name in ("sharpness", "bandwidth", "rate")
            if value is not None and (not isfinite(value) or value < 0 or (positive and value == 0)):
                raise ValueError(f"train: {name} must be {'positive' if positive else 'zero or positive'}, got {value}")

    def _check_k(self) -> None:
        counts = tuple(_integer("k", k, 1) for k in (self.k if isinstance(self.k, tuple) else (self.k,)))
        object.__setattr__(self, "k", counts if isinstance(self.k, tuple) else counts[0])
        for k in counts:
            if self.activation in ("topk", "batchtopk") and k > self.features:
                raise ValueError(f"train: k must be at most the {self.features} features, got {k}")

    def k_at(self, layer: int) -> int:
        """Features a token in this layer."""
        return self.k[layer] if isinstance(self.k, tuple) else self.k

    @property
    def read_site(self) -> Reads:
        """Site where features read: by default the MLP's input for a PLT, the residual stream for a CLT."""
        return self.reads or ("mlp_in" if self.kind == "plt" else "resid_mid")

    @property
    def learning_rate(self) -> float:
        """Adam's rate between warmup and decay."""
        return 2e-4 * (16384 / self.features) ** 0.5 if self.rate is None else self.rate

    def buffer_tokens(self, token_bytes: int) -> int:
        """Tokens in a buffer, at `token_bytes` each."""
        return self.buffer or max(self.batch, min(_BUFFER_TOKENS, _BUFFER_BYTES // token_bytes))

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = self.decay * self.steps
        fall = min(1.0, (self.steps - step) / falling) if falling >= 1 else 1.0
        return self.learning_rate * rise * fall

    def sparsity_at(self, step: int) -> float:
        """Weight of the penalty in a step."""
        rising = self.sparsity_rise * self.steps
        return self.sparsity * (min(1.0, step / rising) if rising >= 1 else 1.0)

    def revives_at(self, step: int) -> bool:
        """Return True if silent features get new rows after this step; never while the rate falls."""
        done = step + 1
        return bool(self.revive) and done % self.revive == 0 and done <= (1 - self.decay) * self.steps


class RecipeOptions(TypedDict, total=False):
    """Keyword arguments of pc.train: the fields of a Recipe, `features` aside."""

    steps: int
    kind: Kind
    activation: ActivationName
    skip: bool
    k: int | tuple[int, ...]
    start: int
    sparsity: float
    sparsity_rise: float
    sharpness: float
    bandwidth: float
    rows: InitialRows
    centre: bool
    massive: float
    passes: int
    batch: int
    rate: float | None
    warmup: int
    decay: float
    revive: int
    buffer: int | None
    context: int
    seed: int
    reads: Reads | None
    writes: Writes
    precision: RowPrecision
    forward: RowPrecision
