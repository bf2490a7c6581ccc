"""Profile of a trace on the card: the heaviest kernels, the launches, every synchronisation by its line."""

from __future__ import annotations

import linecache
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_files import ROOT, Section, attempt

HEAVIEST = 40
TRACE_BYTES = 12 << 20  # a larger one is not left behind


def profile(section: Section, call: Callable[[], Any], what: str) -> None:
    """Save the table of the heaviest kernels and operators, the number of launches, and a trace for a browser."""
    if not section.skip("profile", 8):
        section.save("profile", attempt(lambda: _profile(section, call, what)))


def _profile(section: Section, call: Callable[[], Any], what: str) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if section.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
    events = profiler.key_averages()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    operators = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    result: dict[str, Any] = {"of": what, "launches": {e.key: e.count for e in operators if "Launch" in e.key}}
    result["device seconds"] = sum(event.self_device_time_total for event in kernels) / 1e6
    result["kernels"] = heaviest(kernels, "self_device_time_total")
    result["operators"] = heaviest(operators, "self_cpu_time_total")
    path = section.results / "profile-plt.json.gz"
    profiler.export_chrome_trace(str(path))
    size = path.stat().st_size
    if size > TRACE_BYTES:
        path.unlink()
    return {**result, "trace bytes": size}


def heaviest(events: list[Any], time: str) -> list[dict[str, Any]]:
    """Name, calls and milliseconds of the events that take the most."""
    ordered = sorted(events, key=lambda event: -getattr(event, time))[:HEAVIEST]
    return [{"name": e.key[:100], "calls": e.count, "ms": getattr(e, time) / 1e3} for e in ordered]


def synchronisations(section: Section, call: Callable[[], Any]) -> None:
    """Save every line that makes the host wait for the card, with its count."""
    if section.device != "cuda":
        section.save("synchronisations", {"unavailable": "torch.cuda.set_sync_debug_mode needs a CUDA device"})
    elif not section.skip("synchronisations", 8):
        section.save("synchronisations", attempt(lambda: counted(call)))


def counted(call: Callable[[], Any]) -> dict[str, Any]:
    """Synchronising calls by the line that made them, the most frequent first."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter((w.filename, w.lineno) for w in caught if "synchronizing" in str(w.message))
    return {"count": sum(lines.values()), "lines": [_line(*place, count) for place, count in lines.most_common()]}


def _line(file: str, number: int, count: int) -> dict[str, Any]:
    path = Path(file)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return {"count": count, "line": f"{shown}:{number}", "source": linecache.getline(file, number).strip()}
