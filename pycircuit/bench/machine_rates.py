"""What this machine is and the most it can do: matrix rates, copy rate, read rate."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pycircuit.ops.dispatch import native_isas

_CACHE_GUESS = 32 << 20  # where the last-level cache's size cannot be read


@dataclass(frozen=True)
class Rates:
    """Best of several, with `threads` threads. Matrix rates in operations a second, the others in bytes a second."""

    threads: int
    float32: float
    bfloat16: float
    copy: float
    read: float

    def matrix(self, bfloat16: bool = False) -> float:
        """bfloat16 operands may be widened, so their limit is the better of the two rates."""
        return max(self.float32, self.bfloat16) if bfloat16 else self.float32

    @property
    def memory(self) -> float:
        return max(self.copy, self.read)

    def raised(self, float32: float, read: float) -> Rates:
        """With anything better that was seen since."""
        return replace(self, float32=max(self.float32, float32), read=max(self.read, read))

    def __str__(self) -> str:
        return (
            f"{self.threads} thread{'s' * (self.threads > 1)}: {self.float32 / 1e9:.0f} GFLOP/s float32, "
            f"{self.bfloat16 / 1e9:.0f} bfloat16, copy {self.copy / 1e9:.1f} GB/s, read {self.read / 1e9:.1f} GB/s"
        )


def _fastest(call: Callable[[], object], seconds: float) -> float:
    """Shortest of the calls that fit in `seconds`, at least three."""
    call()
    samples: list[float] = []
    while len(samples) < 3 or sum(samples) < seconds:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return min(samples)


def _matrix_rate(dtype: torch.dtype, seconds: float) -> float:
    """The best over square products that grow until one takes a tenth of `seconds`: bfloat16 may be emulated."""
    best, size = 0.0, 256
    while size <= 2048:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=dtype)
        took = _fastest(partial(torch.matmul, a, b, out=out), seconds / 3)
        best = max(best, 2 * size**3 / took)
        if 8 * took > seconds:
            break
        size *= 2
    return best


_FAR = 64 << 20  # floats, 256 MB: far beyond any cache


def measure(threads: int, seconds: float = 0.6) -> Rates:
    """Every rate with `threads` threads, about 5 x `seconds`."""
    with threads_set(threads):
        source = torch.ones(_FAR)
        target = torch.empty_like(source)
        half = source.view(2, -1)
        reads = (lambda: source.view(512, -1).sum(1), source.amax, lambda: torch.dot(half[0], half[1]))
        return Rates(
            threads=threads,
            float32=_matrix_rate(torch.float32, seconds),
            bfloat16=_matrix_rate(torch.bfloat16, seconds),
            copy=2 * source.nbytes / _fastest(lambda: target.copy_(source), seconds),
            read=source.nbytes / min(_fastest(read, seconds / 2) for read in reads),
        )


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Probe:
    """The matrix and read rates again, between the samples of a row: a shared machine is not always as fast."""

    matrix: Tensor = field(default_factory=lambda: torch.randn(1024, 1024))
    source: Tensor = field(default_factory=lambda: torch.ones(_FAR).view(512, -1))
    float32: float = 0.0
    read: float = 0.0

    def sample(self) -> None:
        start = time.perf_counter()
        torch.matmul(self.matrix, self.matrix)
        middle = time.perf_counter()
        self.source.sum(1)
        end = time.perf_counter()
        self.float32 = max(self.float32, 2 * 1024**3 / (middle - start))
        self.read = max(self.read, self.source.nbytes / (end - middle))


def last_level_cache() -> int:
    """Bytes."""
    sizes = [_CACHE_GUESS]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index[3-9]/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return sizes[-1]


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def cpu_model() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def all_threads() -> int:
    """What torch was started with: the cores, or OMP_NUM_THREADS."""
    return torch.get_num_threads()


def load() -> float | None:
    """One-minute load average, before we add to it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class Others:
    """Cores that other processes kept busy between the start and `cores()`: the load average is too slow for a row."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._before = self._elsewhere()

    def cores(self) -> float | None:
        now = self._elsewhere()
        if now is None or self._before is None:
            return None
        return max(0.0, (now - self._before) / max(time.perf_counter() - self._start, 1e-9))

    @staticmethod
    def _elsewhere() -> float | None:
        """Seconds of work by everyone else since boot."""
        total = next(iter(_lines("/proc/stat")), None)
        if total is None:
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(n) for n in total.split()[1:9])
        own = os.times()
        ticks = os.sysconf("SC_CLK_TCK")
        return (user + nice + system + irq + softirq + steal) / ticks - own.user - own.system


def facts() -> dict[str, Any]:
    built = native_isas()
    compiler = None
    if built:
        from pycircuit import _native

        compiler = _native.compiler
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": compiler,
        "isas": [name for name, supported in built if supported],
        "last_level_cache": last_level_cache(),
        "pinning": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "KMP_"))},
    }


def as_json(rates: Rates) -> dict[str, Any]:
    return asdict(rates)
