"""Libraries of float32 matrix products on this machine, and their rates at square sizes and at a sweep's.

`libraries` has one line a library. All are timed at the same sizes, in turn, and a wrong product gets no time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pycircuit.ops.products import available


@dataclass(frozen=True)
class Size:
    """Sizes of a product [rows, depth] @ [depth, columns]."""

    rows: int
    depth: int
    columns: int

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.depth * self.columns

    def __str__(self) -> str:
        return f"{self.rows} x {self.depth} x {self.columns}"


Product = Callable[[Size], float]  # seconds of one product
Library = Callable[[int], AbstractContextManager[Product]]  # product with so many threads

# Square, and the projections of tiles of the shapes smollm2, small to long, and two wider ones; in order of operations.
SIZES = tuple(
    sorted(
        (
            *(Size(n, n, n) for n in (256, 1024, 2048)),
            Size(4096, 576, 576),
            Size(8192, 512, 512),
            Size(8192, 2048, 512),
            Size(16384, 768, 768),
        ),
        key=lambda size: size.operations,
    )
)
PROBE = Size(1024, 1024, 1024)  # between the samples of a row


def libraries() -> dict[str, Library]:
    """Libraries that are present, by name."""
    present: dict[str, Library] = {f"{torch_blas()} (torch)": partial(_in_process, torch.mm)}
    if "onednn" in available():
        present["oneDNN (torch)"] = partial(_in_process, _linear_pointwise)
    present[f"{numpy_blas()} (numpy)"] = _in_numpy
    if "native" in available():
        present["pycircuit"] = partial(_in_process, _own_product)
    if "amx" in available():
        present["pycircuit (AMX)"] = partial(_in_process, partial(_own_product, parts=3))
    return present


@cache
def torch_blas() -> str:
    """Name of the library that torch's float32 products come from."""
    built_with = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return _library_name(built_with.group(1) if built_with else "BLAS")


@cache
def numpy_blas() -> str:
    """Name of the library that NumPy's products come from."""
    return _library_name(np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"])


def _library_name(name: str) -> str:
    known = {"mkl": "MKL", "open": "OpenBLAS", "accelerate": "Accelerate", "blis": "BLIS"}
    return next((label for word, label in known.items() if word in name.lower()), name)


def _linear_pointwise(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """Return a @ b by oneDNN, in a tensor of its own: this call of torch's has no `out`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return product


def _own_product(a: Tensor, b: Tensor, *, out: Tensor, parts: int = 0) -> Tensor:
    from pycircuit.ops import native  # which a package without its extension module has not

    return native.product(a, b, out, parts=parts)


@contextmanager
def _in_process(multiply: Callable[..., Tensor], threads: int) -> Iterator[Product]:
    """Product by a function (a, b, out=) of this process, which runs with torch's threads."""

    @cache
    def matrices(size: Size) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        a, b = (torch.randn(n, m, generator=g) for n, m in ((size.rows, size.depth), (size.depth, size.columns)))
        return a, b.T.contiguous().T, torch.empty(size.rows, size.columns)  # weights lie as in a Linear

    def seconds(size: Size) -> float:
        a, b, out = matrices(size)
        start = time.perf_counter()
        result = multiply(a, b, out=out)
        took = time.perf_counter() - start
        truth = a[-1].double() @ b.double()
        if not (result[-1] - truth).norm() <= 1e-5 * truth.norm():
            raise ArithmeticError(f"a product {size} is wrong")
        return took

    yield seconds


@contextmanager
def _in_numpy(threads: int) -> Iterator[Product]:
    """Product by NumPy in a process of its own, whose library is bound to so many threads when it loads."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    for library in ("OPENBLAS", "MKL", "OMP", "BLIS"):
        environment[f"{library}_NUM_THREADS"] = str(threads)
    environment["VECLIB_MAXIMUM_THREADS"] = str(threads)
    environment |= {"OPENBLAS_THREAD_TIMEOUT": "4", "KMP_BLOCKTIME": "0"}  # idle threads sleep, or they slow a row
    script = Path(__file__).with_name("numpy_product.py")
    run_script = f"from runpy import run_path; run_path({str(script)!r}, run_name='__main__')"
    with subprocess.Popen(
        [sys.executable, "-c", run_script, ",".join(map(str, _cores()))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        requests, answers = server.stdin, server.stdout

        def seconds(size: Size) -> float:
            requests.write(json.dumps([size.rows, size.depth, size.columns]) + "\n")
            requests.flush()
            return float(answers.readline())

        yield seconds


def _cores() -> list[int]:
    """Cores that any thread of this process may run on: its first one may be pinned to a single core."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        return []
    return sorted(set().union(*(os.sched_getaffinity(int(task.name)) for task in tasks.iterdir())))


@contextmanager
def opened(name: str, threads: int) -> Iterator[Product]:
    """Product by the library of this name; by the first one where none has it."""
    present = libraries()
    with present.get(name, next(iter(present.values())))(threads) as product:
        yield product


def rates(threads: int, seconds: float) -> dict[str, dict[str, float]]:
    """Best rate of every library by size, in operations per second.

    Sizes above PROBE's are left out where four products would take more than `seconds`.
    """
    measured: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        products = {name: stack.enter_context(library(threads)) for name, library in libraries().items()}
        best = 0.0
        for size in SIZES:
            if size.operations > PROBE.operations and 4 * size.operations / best > seconds:
                break
            for name, took in _fastest_in_turn(products, size, seconds / 4).items():
                measured.setdefault(name, {})[str(size)] = rate = size.operations / took
                best = max(best, rate)
    return measured


def _fastest_in_turn(products: dict[str, Product], size: Size, seconds: float) -> dict[str, float]:
    """Seconds of each library's fastest call: one that warms up, then three, or as many as fit in `seconds`."""
    for product in products.values():
        product(size)
    samples: dict[str, list[float]] = {name: [] for name in products}
    while min(map(len, samples.values())) < 3 or sum(map(sum, samples.values())) < seconds * len(samples):
        for name, product in products.items():
            samples[name].append(product(size))
    return {name: min(times) for name, times in samples.items()}
