"""Everything a training run is decided by."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from pycircuit.transcoders.types import READS, WRITES

KINDS = ("plt", "clt")
ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")
PENALISED = ("relu", "jumprelu")
PRECISIONS = ("float32", "bfloat16")


_BUFFER = 1 << 30  # bytes
_MOST = 65536  # tokens


def _whole(name: str, value: object, least: int) -> None:
    if type(value) is not int:
        raise TypeError(f"train: {name} must be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"train: {name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. Lengths are in steps of `batch` tokens.

    kind: "plt" or "clt"; skip: a linear path beside the features. reads, writes: None takes the kind's own.
    k: features a token (topk, and on average batchtopk). start: how many features a token starts with (relu, jumprelu).
    sparsity: weight of the penalty, which grows linearly over the first `sparsity_rise` of the run:
    tanh(sharpness * |decoder row| * value) for jumprelu, |decoder row| * value for relu.
    bandwidth: how near its threshold an entry must be for a JumpReLU to learn from it, in units in which
    pre-activations begin with variance one.
    rate: Adam's; None takes 2e-4 * sqrt(16384 / features). It rises over `warmup` steps and falls to zero over the
    last `decay` of the run.
    revive: features silent for so many steps are given new rows, and looked at that often; 0 never.
    buffer: tokens of activations held at one time and shuffled; None: 1 GiB of them, at most 65,536. context: longest
    piece of a text.
    precision: of the rows as a step reads them and of their gradients. "bfloat16" halves what is read; the weights
    themselves, Adam's moments and all sums stay as they are. Which features are active changes with it.
    """

    features: int
    steps: int = 1000
    kind: str = "plt"
    activation: str = "topk"
    skip: bool = False
    k: int = 32
    start: int = 64
    sparsity: float = 1e-3
    sparsity_rise: float = 1.0
    sharpness: float = 4.0
    bandwidth: float = 1.0
    batch: int = 1024
    rate: float | None = None
    warmup: int = 50
    decay: float = 0.2
    revive: int = 200
    buffer: int | None = None
    context: int = 256
    seed: int = 0
    reads: str | None = None
    writes: str = "mlp_out"
    precision: str = "float32"

    def __post_init__(self) -> None:
        choices = {"kind": KINDS, "activation": ACTIVATIONS, "reads": (*READS, None), "writes": WRITES,
                   "precision": PRECISIONS}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(str(a) for a in allowed if a is not None)
                raise ValueError(f"train: {name} must be one of {known}, got {getattr(self, name)!r}")
        if self.buffer is not None and type(self.batch) is int:
            _whole("buffer", self.buffer, self.batch)
        least = {"features": 1, "steps": 1, "k": 1, "start": 1, "batch": 1, "context": 2, "warmup": 0, "revive": 0}
        for name, bound in least.items():
            _whole(name, getattr(self, name), bound)
        for name in ("sparsity", "sparsity_rise", "decay", "sharpness", "bandwidth", "rate"):
            value, positive = getattr(self, name), name in ("sharpness", "bandwidth", "rate")
            if value is not None and (not isfinite(value) or value < 0 or (positive and value == 0)):
                raise ValueError(f"train: {name} must be {'positive' if positive else 'zero or positive'}, got {value}")
        if self.activation in ("topk", "batchtopk") and self.k > self.features:
            raise ValueError(f"train: k must be at most the {self.features} features, got {self.k}")

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
