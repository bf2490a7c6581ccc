"""Rates of the card and of its connection: products in every arithmetic, copies, transfers, launches."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl
from gpu_files import Section, attempt
from torch import Tensor

from pycircuit.bench import machine_rates
from pycircuit.ops.processor import processor_name
from pycircuit.ops.torch_settings import full_float32
from pycircuit.trace.precision import FLOAT32, PRECISIONS, Products

# Rows, inner width and columns of the sweep's products at gemma2b: a large tile through W_O, a tile of the sweep
# through it, a large tile through W_V; and the square product of data sheets.
PRODUCTS = ((60_000, 2_304, 2_048), (3_077, 2_304, 2_048), (60_000, 1_024, 2_304), (8_192, 8_192, 8_192))
TINY_PRODUCTS = ((24, 16, 8), (16, 16, 16))
TRANSFER_BYTES, LAUNCHES = 1 << 30, 1_000


@triton.jit
def empty_kernel(x):
    tl.store(x, 1.0)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(section: Section, call: Callable[[], Any], runs: int = 5) -> float:
    """Median seconds of a call after a warm-up, to its end on the device."""
    call()
    samples = []
    for _ in range(1 if section.dry else runs):
        synchronise(section.device)
        begin = time.perf_counter()
        call()
        synchronise(section.device)
        samples.append(time.perf_counter() - begin)
    return median(samples)


def product_rates(section: Section, rows: int, inner: int, columns: int) -> dict[str, Any]:
    """TFLOP/s and error against float64 of the sweep's x @ w in every precision."""
    x, w = (torch.randn(*shape, device=section.device) for shape in ((rows, inner), (inner, columns)))
    exact, operations = x[:64].double() @ w.double(), 2 * rows * inner * columns

    def rate(call: Callable[[], Tensor]) -> dict[str, float]:
        error = float((call()[:64].double() - exact).norm() / exact.norm())
        return {"tflops": operations / seconds(section, call) / 1e12, "error": error}

    def split() -> float:
        products = Products(PRECISIONS["float32"])
        return 16 * x.numel() / seconds(section, lambda: products.split(x)) / 1e9  # 4 bytes read, 6 parts written

    rates: dict[str, Any] = {}
    for name, arithmetic in {"no tensor cores": FLOAT32, **PRECISIONS}.items():
        products = Products(arithmetic)
        with full_float32():
            rates[name] = attempt(lambda p=products: rate(lambda: p.project(x, w)))
    rates["split into 3 bfloat16 GB/s"] = attempt(split)
    return rates


def transfer_rates(section: Section) -> dict[str, Any]:
    """GB/s on the card and between it and the host; the first touch of host memory is timed separately."""
    count = TRANSFER_BYTES if not section.dry else 1 << 12
    on_card, other = (torch.empty(count, dtype=torch.uint8, device=section.device) for _ in range(2))
    rates: dict[str, Any] = {"copy": 2 * count / seconds(section, lambda: other.copy_(on_card)) / 1e9}
    pageable = torch.empty(count, dtype=torch.uint8)
    begin = time.perf_counter()
    pageable.fill_(1)
    rates["host first touch"] = count / (time.perf_counter() - begin) / 1e9
    rates["host again"] = count / seconds(section, lambda: pageable.fill_(2)) / 1e9
    rates["D2H pageable"] = count / seconds(section, lambda: pageable.copy_(on_card)) / 1e9
    rates["H2D pageable"] = count / seconds(section, lambda: on_card.copy_(pageable)) / 1e9

    def pinned(to_host: bool) -> float:
        host = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        target, source = (host, on_card) if to_host else (on_card, host)
        return count / seconds(section, lambda: target.copy_(source, non_blocking=True)) / 1e9

    rates["D2H pinned"], rates["H2D pinned"] = attempt(lambda: pinned(True)), attempt(lambda: pinned(False))
    return rates


def launch_costs(section: Section) -> dict[str, Any]:
    """Microseconds on the host and to completion: a torch kernel, a Triton kernel, a synchronisation, a small copy."""
    x, count = torch.zeros(256, device=section.device), LAUNCHES if not section.dry else 2
    calls = {
        "torch launch": lambda: x.add_(1),
        "Triton launch": lambda: empty_kernel[(1,)](x),
        "to the host 1 KB": x.cpu,
    }
    costs: dict[str, Any] = {}
    for name, call in calls.items():
        call()
        synchronise(section.device)
        begin = time.perf_counter()
        for _ in range(count):
            call()
        issued = time.perf_counter() - begin
        synchronise(section.device)
        costs[name] = {"host_us": 1e6 * issued / count, "us": 1e6 * (time.perf_counter() - begin) / count}
    costs["synchronise"] = {
        "us": 1e6 * seconds(section, lambda: [synchronise(section.device) for _ in range(count)]) / count
    }
    return costs


def facts(section: Section) -> dict[str, Any]:
    """Machine and installed versions."""
    about: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    about |= {"python": platform.python_version(), "cpu": processor_name(), "cores": os.cpu_count()}
    about |= {"host_memory_free": machine_rates.available_memory(), "load": machine_rates.load()}
    about["cublas_workspace"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if section.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        about |= {"gpu": card.name, "memory": card.total_memory, "memory_free": torch.cuda.mem_get_info()[0]}
        about |= {"multiprocessors": card.multi_processor_count, "compute": f"{card.major}.{card.minor}"}
    about["nvidia-smi"] = attempt(_clocks)
    return about


def _clocks() -> str:
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,persistence_mode"
    command = ["nvidia-smi", query, "--format=csv"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def card(section: Section) -> None:
    section.save("machine", facts(section))
    section.save("launches", attempt(lambda: launch_costs(section)))
    for rows, inner, columns in TINY_PRODUCTS if section.dry else PRODUCTS:
        rates = attempt(lambda r=rows, i=inner, c=columns: product_rates(section, r, i, c))
        section.save(f"product {rows} x {inner} x {columns}", rates)
    section.save("transfers GB/s", attempt(lambda: transfer_rates(section)))
    section.save("clocks after", attempt(_clocks))
