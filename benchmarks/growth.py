"""Time by phase and memory of a trace as its prompt grows, with the number of features fixed.

    python benchmarks/growth.py [--shape 64 --shape 128 ...]      or: make bench-growth, which writes RESULTS.md

The model is that of the shape `long`; prompts of 64 to 8,192 tokens, 64 features expanded. Every prompt runs in a
process of its own, and its figures are written as soon as it is done. What is there from an earlier run of this code,
on this processor with this number of threads, is not measured again unless other programs were busy meanwhile;
--again measures it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import command_line
import numpy as np
import torch
from log_plot import LogPanel, chart

import pycircuit as pc
from pycircuit.bench import machine_rates, memory, models, whole_trace
from pycircuit.bench.shapes import SHAPES
from pycircuit.bench.whole_trace import Traced
from pycircuit.ops.processor import processor_name

FOLDER = Path(__file__).parent
POSITIONS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
SHAPE, MEMORY = SHAPES["long"], "2.5GiB"
WARM, MOST_SECONDS = 32, 10.0  # tokens of the untimed first trace; no further round is begun after so many seconds
QUIET = 0.2  # cores taken by other programs, at most, for a point that is not measured again
SPLIT = 1024  # tokens where the second fit begins and the first ends
SOURCES = ("pycircuit", "kernels", "csrc", ":!pycircuit/bench", ":!pycircuit/cli")


# One prompt, in a process of its own


def measure(positions: int, threads: int, rounds: int) -> dict[str, Any]:
    """Measure traces of a prompt of `positions` tokens in this process."""
    shape = replace(SHAPE, positions=positions)
    model, ids = models.replacement(shape), models.prompt(positions)
    pc.attribute(model, ids[:WARM], max_features=shape.targets or "all", memory=MEMORY, labels=False, progress=False)
    traced = Traced(SHAPE.name, "native", threads, load=machine_rates.load())
    traced.base, others = memory.restart_peak(), machine_rates.Others()
    while not traced.times or (len(traced.times) < rounds and sum(traced.times) < MOST_SECONDS):
        with pc.use("native"):
            graph, seconds = whole_trace.clocked(
                lambda: pc.attribute(
                    model, ids, max_features=shape.targets or "all", memory=MEMORY, labels=False, progress=True
                )
            )
        if not traced.times:
            traced.peak = memory.peak()
            traced.describe(graph, shape)
            traced.certificate = graph.certificate
            dropped = float(graph.dropped.sum())
        traced.add(seconds, graph.timings)
        del graph
    traced.others = others.cores()
    return {"positions": positions, "dropped": dropped, **traced.as_json()}


def measure_apart(positions: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a prompt in a process of its own."""
    command = [*shlex.split(options.prefix), sys.executable, __file__, "--point", str(positions)]
    command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(
            f"bench-growth: {positions:,} tokens need a process that ends with 0, got {done.returncode}; "
            f"run it again, it goes on from the points in {options.json}"
        )
    return json.loads(done.stdout.splitlines()[-1])


# Points that an earlier run left


def code_version() -> str | None:
    """Commit of the code that a trace runs; None where it differs from its commit, or without git."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words, "--", *SOURCES], cwd=FOLDER.parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    return git("log", "-1", "--format=%h") or None if git("status", "--porcelain") == "" else None


def conditions(threads: int) -> dict[str, Any]:
    """Conditions under which two points may stand in one table."""
    return {"commit": code_version(), "cpu": processor_name(), "threads": threads}


def earlier_points(path: Path, now: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Points by number of tokens that a run under the same conditions wrote; none where the code has no commit."""
    if not path.exists() or now["commit"] is None:
        return {}
    document = json.loads(path.read_text())
    return {point["positions"]: point for point in document["points"]} if document["conditions"] == now else {}


def stands(point: dict[str, Any]) -> bool:
    """Return True for a point that was measured while other programs left the cores alone."""
    return point["others"] is None or point["others"] <= QUIET


# Report


def exponent(positions: Sequence[int], values: Sequence[float]) -> float | None:
    """Exponent of the power law that fits the values best, in logarithms; None for fewer than three points."""
    if len(positions) < 3:
        return None
    return float(np.polyfit([log(p) for p in positions], [log(v) for v in values], 1)[0])


def series(points: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Seconds of each phase in the median run of every point, and the median in all."""
    phases = {name: [p["timings"][name] for p in points] for name in points[0]["timings"]}
    return {**phases, "in all": [median(p["times"]) for p in points]}


def gigabytes(points: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Peak memory of the process, and what of it came with the trace; empty where the system reports none."""
    if any(p["peak"] is None for p in points):
        return {}
    return {
        "process": [p["peak"] / 1e9 for p in points],
        "trace": [(p["peak"] - p["base"]) / 1e9 for p in points],
    }


def picture(points: Sequence[dict[str, Any]]) -> str:
    """Seconds by phase and memory over the tokens, as SVG."""
    tokens = [p["positions"] for p in points]
    figures = {"seconds": series(points), "peak memory, GB": gigabytes(points)}
    panels = [
        LogPanel(title, "tokens", {name: list(zip(tokens, line, strict=True)) for name, line in lines.items()}, tokens)
        for title, lines in figures.items()
        if lines
    ]
    return chart(panels)


HEADER = ("tokens", "active", "runs", "seconds", "phases", "GFLOP of the sweep", "GB, process / trace", "certificate")
HEADER += ("load/others",)


def _row(point: dict[str, Any]) -> tuple[str, ...]:
    fields = {name: value for name, value in point.items() if name not in ("positions", "dropped")}
    traced = whole_trace.from_json(fields)
    memory_text = "-"
    if traced.peak is not None and traced.base is not None:
        memory_text = f"{traced.peak / 1e9:.2f} / {(traced.peak - traced.base) / 1e9:.2f}"
    return (
        f"{point['positions']:,}",
        f"{traced.active:,}",
        str(len(traced.times)),
        f"{traced.median:.2f}",
        whole_trace.phases(traced),
        f"{traced.operations / 1e9:,.0f}",
        memory_text,
        f"{traced.certificate:.1e}",
        whole_trace.busy(traced),
    )


def _exponents(points: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of the table of exponents: a line's name, its fit up to SPLIT tokens and its fit from there."""
    tokens = [p["positions"] for p in points]
    lines = series(points) | {f"memory, {name}": line for name, line in gigabytes(points).items()}
    table = []
    for name, values in lines.items():
        halves = []
        for chosen in ([t <= SPLIT for t in tokens], [t >= SPLIT for t in tokens]):
            pairs = [(t, v) for t, v, use in zip(tokens, values, chosen, strict=True) if use]
            fitted = exponent([t for t, _ in pairs], [v for _, v in pairs])
            halves.append("-" if fitted is None else f"{fitted:.2f}")
        table.append((name, *halves))
    return table


def markdown(results: dict[str, Any], svg: str) -> str:
    """Section of RESULTS.md. svg: address of the picture."""
    facts, where, points = results["machine"], results["conditions"], results["points"]
    threads = f"{where['threads']} thread{'s' * (where['threads'] > 1)}"
    dropped = [f"{p['positions']:,}" for p in points if p["dropped"]]
    cut = f"entries were cut at {', '.join(dropped)} tokens" if dropped else "no entry was cut"
    lines = [
        "# Where time goes as the prompt grows",
        "",
        "Written by `make bench-growth`; do not edit. `pc.attribute` on the model of the shape `long` (8 layers of",
        f"width 512, 8,192 features each, 32 active), {SHAPE.targets} features expanded, memory={MEMORY!r}: {cut}.",
        "Every prompt ran in a process of its own after a short warm-up. Seconds are medians, phases those of the",
        "median run, memory that of the first. An exponent is the slope of a line through the logarithms: at 1 a",
        "figure grows with the tokens, at 2 with their square. *load/others*: as above.",
        "",
        f"- commit {where['commit'] or 'none'}, torch {facts['torch']}, {where['cpu']}, {threads}",
        "",
        f"![Seconds by phase and peak memory over the number of tokens, both axes logarithmic]({svg})",
        "",
        *whole_trace.markdown_table(HEADER, [_row(point) for point in points]),
        "",
        *whole_trace.markdown_table(("", f"exponent to {SPLIT:,} tokens", f"from {SPLIT:,}"), _exponents(points)),
    ]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    shapes = [str(positions) for positions in POSITIONS]
    parser = command_line.parser("growth", __doc__, threads=2, rounds=3, shapes=shapes, results=True, always=True)
    parser.add_argument("--prefix", default="", help="a command to run each prompt under, for example 'taskset -c 0,1'")
    parser.add_argument("--again", action="store_true", help="measure again what an earlier run has")
    parser.add_argument("--svg", type=Path, default=FOLDER / "growth.svg", help="file of the picture")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every prompt that is missing; write the numbers after each."""
    now = conditions(options.threads)
    points = earlier_points(options.json, now)
    results = {"machine": machine_rates.facts(), "conditions": now, "points": []}
    wanted = [int(name) for name in options.shape or map(str, POSITIONS)]
    for index, positions in enumerate(wanted, 1):
        state = f"{positions:,} tokens ({index} of {len(wanted)})"
        if positions in points and stands(points[positions]) and not options.again:
            print(f"{state}: from the earlier run", file=sys.stderr, flush=True)
        else:
            print(f"{state} ...", file=sys.stderr, flush=True)
            points[positions] = measure_apart(positions, options)
            print(f"{state}: {median(points[positions]['times']):.2f} s", file=sys.stderr, flush=True)
        results["points"] = [points[key] for key in sorted(points)]
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.point:
        print(json.dumps(measure(options.point, options.threads, options.rounds)))
        return
    results = run(options)
    options.svg.write_text(picture(results["points"]))
    svg = Path(os.path.relpath(options.svg, options.markdown.parent)).as_posix()
    command_line.publish(options, "growth", results, markdown(results, svg))


if __name__ == "__main__":
    main()
