"""Everything a training run is decided by."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import TypeVar

from pycircuit.ops.checks import is_int
from pycircuit.transcoders.types import READS, WRITES

KINDS = ("plt", "clt")
ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")
PENALISED = ("relu", "jumprelu")
ROWS = ("random", "tokens")
PRECISIONS = ("float32", "bfloat16")
CHOICES: dict[str, tuple[str, ...]] = {
    "kind": KINDS, "activation": ACTIVATIONS, "reads": READS, "writes": WRITES, "precision": PRECISIONS,
    "rows": ROWS,
}  # fmt: skip
SAYS = "says"  # of a field: what it is, as the command line and the docs say it
T = TypeVar("T")

_BUFFER = 1 << 30  # bytes
_MOST = 65536  # tokens


def _whole(name: str, value: object, least: int) -> int:
    if not is_int(value):
        raise TypeError(f"train: {name} must be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"train: {name} must be at least {least}, got {value}")
    return int(value)


def _option(default: T, says: str) -> T:
    made: T = field(default=default, metadata={SAYS: says})
    return made


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. Lengths are in steps of `batch` tokens.

    The penalty of jumprelu is tanh(sharpness * |decoder row| * value), that of relu |decoder row| * value. bandwidth
    is in units in which pre-activations begin with variance one. precision "bfloat16" halves what is read; the weights
    themselves, Adam's moments and all sums stay as they are. Which features are active changes with it.
    """

    features: int = field(metadata={SAYS: "features a layer"})
    steps: int = _option(1000, "how many, of `batch` tokens")
    kind: str = _option("plt", "plt: each layer's features write to it; clt: to it and every later one")
    activation: str = _option("topk", " | ".join(ACTIVATIONS))
    skip: bool = _option(False, "a linear path beside the features")
    k: int | tuple[int, ...] = _option(32, "features a token (topk), or on average (batchtopk); or of each layer")
    start: int = _option(64, "features a token at the start (relu, jumprelu)")
    sparsity: float = _option(1e-3, "weight of the penalty on features (relu, jumprelu)")
    sparsity_rise: float = _option(1.0, "share of the run over which that weight grows from zero")
    sharpness: float = _option(4.0, "inside the penalty's tanh (jumprelu)")
    bandwidth: float = _option(1.0, "how near its threshold an entry must be for the threshold to learn (jumprelu)")
    rows: str = _option("random", "what weights begin as: random | tokens, of the first ones, unlike each other")
    batch: int = _option(1024, "tokens a step")
    rate: float | None = _option(None, "Adam's; None: 2e-4 * sqrt(16384 / features)")
    warmup: int = _option(50, "steps over which the rate rises")
    decay: float = _option(0.2, "last share of the run, over which the rate falls to zero")
    revive: int = _option(200, "features silent for so many steps get new rows; 0: never")
    buffer: int | None = _option(None, "tokens held and shuffled at a time; None: 1 GiB of them, at most 65,536")
    context: int = _option(256, "longest piece of a text, in tokens")
    seed: int = _option(0, "of weights and shuffling")
    reads: str | None = _option(None, " | ".join(READS) + "; None: mlp_in for plt, resid_mid for clt")
    writes: str = _option("mlp_out", " | ".join(WRITES))
    precision: str = _option("float32", " | ".join(PRECISIONS) + ", of rows as a step reads them")

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "reads" and value is None):
                raise ValueError(f"train: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.buffer is not None and is_int(self.batch):
            object.__setattr__(self, "buffer", _whole("buffer", self.buffer, self.batch))
        least = {"features": 1, "steps": 1, "start": 1, "batch": 1, "context": 2, "warmup": 0, "revive": 0}
        for name, bound in least.items():
            object.__setattr__(self, name, _whole(name, getattr(self, name), bound))
        if is_int(self.seed):
            object.__setattr__(self, "seed", int(self.seed))
        for name in ("sparsity", "sparsity_rise", "decay", "sharpness", "bandwidth", "rate"):
            value, positive = getattr(self, name), name in ("sharpness", "bandwidth", "rate")
            if value is not None and (not isfinite(value) or value < 0 or (positive and value == 0)):
                raise ValueError(f"train: {name} must be {'positive' if positive else 'zero or positive'}, got {value}")
        counts = tuple(_whole("k", k, 1) for k in (self.k if isinstance(self.k, tuple) else (self.k,)))
        object.__setattr__(self, "k", counts if isinstance(self.k, tuple) else counts[0])
        for k in counts:
            if self.activation in ("topk", "batchtopk") and k > self.features:
                raise ValueError(f"train: k must be at most the {self.features} features, got {k}")

    def k_at(self, layer: int) -> int:
        return self.k[layer] if isinstance(self.k, tuple) else self.k

    @property
    def read(self) -> str:
        """Where features read: as DESIGN has it, a PLT the MLP's input and a CLT the stream."""
        return self.reads or ("mlp_in" if self.kind == "plt" else "resid_mid")

    @property
    def learning_rate(self) -> float:
        return 2e-4 * (16384 / self.features) ** 0.5 if self.rate is None else self.rate

    def held(self, token: int) -> int:
        """Tokens in a buffer, at `token` bytes each."""
        return self.buffer or max(self.batch, min(_MOST, _BUFFER // token))

    def rate_at(self, step: int) -> float:
        """Of the step with this number, from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = self.decay * self.steps
        fall = min(1.0, (self.steps - step) / falling) if falling >= 1 else 1.0
        return self.learning_rate * rise * fall

    def sparsity_at(self, step: int) -> float:
        rising = self.sparsity_rise * self.steps
        return self.sparsity * (min(1.0, step / rising) if rising >= 1 else 1.0)

    def revives_at(self, step: int) -> bool:
        """Not while the rate falls: what comes then has no time to learn."""
        done = step + 1
        return bool(self.revive) and done % self.revive == 0 and done <= (1 - self.decay) * self.steps
