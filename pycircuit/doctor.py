"""Report on this machine and on the implementation that each op would use on it."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

import torch

import pycircuit as pc

from .bench import machine_rates
from .ops import products
from .ops.dispatch import ImplementationError, Request, native_isas, plan
from .ops.processor import processor_name
from .ops.registry import OPS

_SECONDS = 0.1  # of each measurement of a rate
BUSY = 0.3  # cores taken by other programs above which a timing is not trusted


def examine() -> dict[str, Any]:
    """Return the report of `pycircuit doctor`, ready for JSON."""
    others = machine_rates.Others()
    rates = [machine_rates.as_json(machine_rates.measure(n, _SECONDS)) for n in _thread_counts()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "pycircuit": pc.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "native": _native(),
        "isas": dict(native_isas()),
        "products": _products(),
        "rates": rates,
        "others": others.cores(),
        "ops": {op: {where: _plan(op, where) for where in dict.fromkeys(("cpu", device))} for op in OPS},
    }


def _thread_counts() -> list[int]:
    return list(dict.fromkeys((1, machine_rates.all_threads())))


def _installed(package: str) -> str | None:
    try:
        return installed(package)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
    }


def _native() -> dict[str, Any] | None:
    """Compiler of the extension module and, if it was built with CUDA, the versions of runtime and driver."""
    if not native_isas():
        return None
    from . import _native as module

    cuda = module.cuda()
    versions = None if cuda is None else {"runtime": _version(cuda[0]), "driver": _version(cuda[1])}
    return {"compiler": module.compiler, "cuda": versions}


def _products() -> dict[str, Any]:
    """Providers of dense products: those there are, the forced one, and how many shape classes each has won so far."""
    won = Counter(products.fastest(rates) for rates in products.measured().values())
    return {"available": list(products.available()), "forced": products.forced_provider(), "won": dict(won)}


def _version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _plan(op: str, device: str) -> dict[str, Any]:
    try:
        chosen = plan(Request(op, device, (torch.float32,)))
    except ImplementationError as error:  # a forced implementation cannot run: reported, not raised
        return {"implementation": None, "isa": None, "others": {"forced": str(error)}}
    first = chosen.implementation
    others = {
        name: f"could run, {first} comes first" if reason == "could run" else reason
        for name, reason in chosen.reasons
        if name != first
    }
    return {"implementation": first, "isa": chosen.isa, "others": others}


def lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines (name, value) of a report for people; the ops are in `op_lines`."""
    native = report["native"]
    cuda = (native or {}).get("cuda")
    gpus = [f"{g['name']} (compute {g['capability']}, {g['memory_gb']:g} GB)" for g in report["gpus"]]
    isas = [name if supported else f"{name} (not on this machine)" for name, supported in report["isas"].items()]
    return [
        ("pycircuit", f"{report['pycircuit']}, Python {report['python']}, {report['system']}"),
        ("CPU", f"{report['cpu']}, {report['threads']} threads"),
        ("kernels", ", ".join(isas) + f"; {native['compiler']}" if native else "not built; reinstall with a compiler"),
        ("products", _product_line(report["products"])),
        ("CUDA build", f"runtime {cuda['runtime']}, driver {cuda['driver'] or 'none'}" if cuda else "no"),
        ("GPU", "; ".join(gpus) or "none"),
        ("torch", report["torch"]),
        ("triton", report["triton"] or "not installed; pip install 'pycircuit[triton]' for GPUs"),
    ]


def _product_line(report: dict[str, Any]) -> str:
    forced, won = report["forced"], report["won"]
    if forced:
        return f"{forced}, forced by {products.ENVIRONMENT}"
    counts = [f"{name} for {won[name]} shape classes" for name in report["available"] if name in won]
    choice = ", ".join(counts) or "not measured yet; the first trace does"
    return f"{choice} (of {', '.join(report['available'])}; {products.ENVIRONMENT} forces one)"


def rate_lines(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Lines (threads, rate of, value) of a report: multiply-adds, every library's best product, the best, memory."""
    rows = []
    for entry in report["rates"]:
        rates, threads = machine_rates.Rates(**entry), str(entry["threads"])
        figures = {f"multiply-adds, {isa}": _gflops(rate) for isa, rate in rates.multiply_adds.items()}
        for library, by_size in rates.products.items():
            size = max(by_size, key=by_size.__getitem__)
            figures[f"product, {library}"] = f"{_gflops(by_size[size])} at {size}"
        of_peak = f", {100 * rates.float32 / rates.peak:.0f}% of multiply-adds" if rates.peak else ""
        figures["best product"] = f"{_gflops(rates.float32)} by {rates.fastest}{of_peak}"
        figures["bfloat16 product"] = _gflops(rates.bfloat16)
        figures |= {"copy": f"{rates.copy / 1e9:.1f} GB/s", "read": f"{rates.read / 1e9:.1f} GB/s"}
        rows += [(threads, name, value) for name, value in figures.items()]
    return rows


def _gflops(rate: float) -> str:
    return f"{rate / 1e9:.0f} GFLOP/s"


def op_lines(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Lines (op, device, implementation, reasons against the others) of a report."""
    rows = []
    for op, devices in report["ops"].items():
        for device, op_plan in devices.items():
            runs = (op_plan["implementation"] or "nothing") + (f" ({op_plan['isa']})" if op_plan["isa"] else "")
            others = "; ".join(f"{name}: {reason}" for name, reason in op_plan["others"].items())
            rows.append((op, device, runs, others))
    return rows
