"""Description of this machine and its best rates: multiply-adds, matrix products, copies, reads."""

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

from pycircuit.ops.dispatch import PARTS_ISAS, native_isas
from pycircuit.ops.processor import processor_name

from . import library_rates
from .library_rates import PROBE, Product

_CACHE_GUESS = 32 << 20  # where the last-level cache's size cannot be read


@dataclass(frozen=True)
class Rates:
    """Best rates with `threads` threads: operations per second, for copy and read bytes per second.

    float32: the best product of any library, at any size; products: by library and size; multiply_adds: in registers,
    by instruction set, those of the native core; read: by as many streams as keep the memory busy.
    """

    threads: int
    float32: float
    bfloat16: float
    copy: float
    read: float
    products: dict[str, dict[str, float]] = field(default_factory=dict)
    multiply_adds: dict[str, float] = field(default_factory=dict)

    def matrix(self, bfloat16: bool = False) -> float:
        """Matrix rate of a type: bfloat16 operands may be widened, so theirs is the better of the two."""
        return max(self.float32, self.bfloat16) if bfloat16 else self.float32

    @property
    def memory(self) -> float:
        return max(self.copy, self.read)

    @property
    def fastest(self) -> str:
        """Name of the library with the best product; empty where none was measured."""
        return max(self.products, key=lambda name: max(self.products[name].values()), default="")

    @property
    def peak(self) -> float | None:
        """Multiply-adds of the best instruction set; None without the native core."""
        return max(self.multiply_adds.values(), default=None)

    def fastest_at(self, size: str) -> str:
        """Name of the library with the best product of this size; empty where none was measured."""
        return max(
            (name for name in self.products if size in self.products[name]),
            default="",
            key=lambda name: self.products[name][size],
        )

    def raised(self, **better: float) -> Rates:
        """Rates raised to better ones, by name, measured later."""
        return replace(self, **{name: max(getattr(self, name), rate) for name, rate in better.items()})

    def __str__(self) -> str:
        by = f" ({self.fastest})" if self.fastest else ""
        peak = f", {self.peak / 1e9:.0f} in registers" if self.peak else ""
        return (
            f"{self.threads} thread{'s' * (self.threads > 1)}: {self.float32 / 1e9:.0f} GFLOP/s float32{by}{peak}, "
            f"{self.bfloat16 / 1e9:.0f} bfloat16, copy {self.copy / 1e9:.1f} GB/s, read {self.read / 1e9:.1f} GB/s"
        )


def _fastest(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit in `seconds`, at least three."""
    call()
    samples: list[float] = []
    while len(samples) < 3 or sum(samples) < seconds:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return min(samples)


def _bfloat16_rate(seconds: float) -> float:
    """Best rate of square products that grow until one takes a tenth of `seconds`: bfloat16 may be emulated."""
    best, size = 0.0, 256
    while size <= 2048:
        a, b = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
        out = torch.empty(size, size, dtype=torch.bfloat16)
        took = _fastest(partial(torch.matmul, a, b, out=out), seconds / 3)
        best = max(best, 2 * size**3 / took)
        if 8 * took > seconds:
            break
        size *= 2
    return best


_FAR = 64 << 20  # floats, 256 MB: far beyond any cache
_ROUNDS = 1_000_000  # of multiply-adds, some milliseconds


def measure(threads: int, seconds: float = 0.6) -> Rates:
    """Measure every rate with `threads` threads, in about 12 x `seconds`."""
    with threads_set(threads):
        source = torch.ones(_FAR)
        target = torch.empty_like(source)
        by_library = library_rates.rates(threads, seconds)
        return Rates(
            threads=threads,
            float32=max(rate for by_size in by_library.values() for rate in by_size.values()),
            bfloat16=_bfloat16_rate(seconds),
            copy=2 * source.nbytes / _fastest(lambda: target.copy_(source), seconds),
            read=max(_read_rate(read, source, seconds / 3) for read in _readers()),
            products=by_library,
            multiply_adds=_multiply_add_rates(threads, seconds / 3),
        )


Reader = Callable[[Tensor], float]  # reads at least so many bytes of a tensor once


def _readers() -> list[Reader]:
    """Ways to read memory, the native core's first: eight streams a thread, where torch's sums have one or few."""
    by_torch: list[Reader] = [_torch_sum, _torch_dot]
    return [_stream_read, *by_torch] if native_isas() else by_torch


def _stream_read(source: Tensor) -> float:
    from pycircuit import _native

    bytes_read, total = _native.stream_read(_best_isa(), source.data_ptr(), source.numel(), torch.get_num_threads())
    if 4 * total < bytes_read * (1 - 1e-3):
        raise ArithmeticError(f"stream_read: the sum must be that of {bytes_read / 4:.0f} ones, got {total}")
    return bytes_read


def _torch_sum(source: Tensor) -> float:
    source.view(512, -1).sum(1)
    return source.nbytes


def _torch_dot(source: Tensor) -> float:
    half = source.view(2, -1)
    torch.dot(half[0], half[1])
    return source.nbytes


def _read_rate(read: Reader, source: Tensor, seconds: float) -> float:
    return read(source) / _fastest(partial(read, source), seconds)


def _best_isa() -> int:
    return max(index for index, (_, supported) in enumerate(native_isas()) if supported)


def _multiply_add_rates(threads: int, seconds: float) -> dict[str, float]:
    """Multiply-adds in registers by instruction set, two operations each; where they do not fuse, as they run."""
    rates = {}
    for index, (name, supported) in enumerate(native_isas()):
        if supported and name not in PARTS_ISAS:
            from pycircuit import _native

            call = partial(_native.multiply_adds, index, _ROUNDS, threads)
            rates[name] = call()[0] / _fastest(call, seconds)
    return rates


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
    """Product and read rates measured between the samples of a row: the speed of a shared machine varies."""

    product: Product
    source: Tensor = field(default_factory=lambda: torch.ones(_FAR))
    float32: float = 0.0
    read: float = 0.0

    def sample(self) -> None:
        self.float32 = max(self.float32, PROBE.operations / self.product(PROBE))
        start = time.perf_counter()
        bytes_read = _readers()[0](self.source)
        self.read = max(self.read, bytes_read / (time.perf_counter() - start))

    @property
    def best(self) -> dict[str, float]:
        return {"float32": self.float32, "read": self.read}


@contextmanager
def probe(rates: Rates) -> Iterator[Probe]:
    """Probe by the library that is the best at its size, with the threads of the rates."""
    with library_rates.opened(rates.fastest_at(str(PROBE)), rates.threads) as product:
        yield Probe(product)


def last_level_cache() -> int:
    """Bytes of the last-level cache."""
    sizes = [_CACHE_GUESS]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index[3-9]/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return sizes[-1]


def available_memory() -> int | None:
    """Bytes available without swapping; None where the system does not report them."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


def all_threads() -> int:
    """Number of threads that torch was started with: the cores, or OMP_NUM_THREADS."""
    return torch.get_num_threads()


def load() -> float | None:
    """One-minute load average; None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class Others:
    """Cores that other processes use between the start and `cores()`; a load average is too slow for a row."""

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
        """Seconds of work since boot by all processes but this one and those that it started and that have ended."""
        total = next(iter(_lines("/proc/stat")), None)
        if total is None:
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(n) for n in total.split()[1:9])
        own = os.times()
        ticks = os.sysconf("SC_CLK_TCK")
        ours = own.user + own.system + own.children_user + own.children_system
        return (user + nice + system + irq + softirq + steal) / ticks - ours


def facts() -> dict[str, Any]:
    built = native_isas()
    compiler = None
    if built:
        from pycircuit import _native

        compiler = _native.compiler
    return {
        "cpu": processor_name(),
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
